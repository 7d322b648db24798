"""Optimal transport for uda."""
