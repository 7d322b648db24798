"""A sample plugin distribution for uda."""

from uda_sample.centroids import CentroidLabels

__all__ = ["CentroidLabels"]
