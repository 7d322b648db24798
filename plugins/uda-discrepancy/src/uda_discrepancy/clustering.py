"""Spherical k-means with given first centres, in whole matrices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_centres(features: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean directions: ``sum_i 1[y_i = c] f_i / |f_i|`` scaled to unit length.

    Args:
        features: ``[N, F]``; y: class ids ``[N]``.

    Returns:
        Centres ``[C, F]`` (zero for a class without a sample) and samples a class ``[C]``, both float32.
    """
    members = F.one_hot(y, classes).to(torch.float32)
    sums = members.T @ F.normalize(features.float(), dim=1)
    return F.normalize(sums, dim=1), members.sum(0)


def cosine_dissimilarity(features: Tensor, centres: Tensor) -> Tensor:
    """``(1 - cos(f_i, o_c)) / 2`` in [0, 1], ``[N, F]``, ``[C, F]`` -> ``[N, C]``."""
    return (1 - F.normalize(features.float(), dim=1) @ F.normalize(centres.float(), dim=1).T) / 2


def spherical_kmeans(
    features: Tensor, centres: Tensor, tolerance: float = 0.005, iterations: int = 100
) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster by direction, starting from class centres, until the centres move less than ``tolerance`` in the mean.

    A cluster that loses all its samples keeps its centre, so that clusters stay classes.

    Args:
        features: ``[N, F]``; centres: ``[C, F]``.

    Returns:
        Cluster of each sample ``[N]``, its dissimilarity to the centre ``[N]``, and the centres ``[C, F]``.
    """
    centres = F.normalize(centres.float(), dim=1)
    for _ in range(iterations):
        moved, count = class_centres(features, cosine_dissimilarity(features, centres).argmin(1), len(centres))
        moved = torch.where(count[:, None] > 0, moved, centres)
        shift = float((1 - (moved * centres).sum(1)).mean() / 2)
        centres = moved
        if shift < tolerance:
            break
    distance, label = cosine_dissimilarity(features, centres).min(1)
    return label, distance, centres
