"""Adaptation from several sources for uda."""

from uda_multisource.darn import DARN
from uda_multisource.m3sda import M3SDA
from uda_multisource.mdan import MDAN
from uda_multisource.mfsan import MFSAN
from uda_multisource.weights import SourceWeights

__all__ = ["DARN", "M3SDA", "MDAN", "MFSAN", "SourceWeights"]
