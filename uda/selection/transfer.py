"""Transfer score: evenness of the classifier, clustering tendency, and mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda.selection.information import information_maximisation
from uda.selection.pool import PoolScore, ScorePool


def classifier_unevenness(class_vectors: Tensor) -> Tensor:
    """How far the angles between class vectors ``[C, F]`` are from those of a simplex, radians^2.

    ``mean_{i != j} (theta_ij - arccos(-1 / (C - 1)))^2``, as in the authors' code; 0 for a regular simplex.
    """
    w = F.normalize(class_vectors.detach().double(), dim=1)
    c = len(w)
    angle = (w @ w.T).clamp(-1, 1).arccos()
    off = ~torch.eye(c, dtype=torch.bool, device=w.device)
    return (angle[off] - math.acos(-1 / (c - 1))).square().mean()


def hopkins(features: Tensor, share: float = 0.05, seed: int = 0) -> Tensor:
    """Hopkins statistic of features ``[N, F]``; in ``[0, 1]``: near 1 when clustered, 1/2 for even noise.

    ``sum u / (sum u + sum w)``: ``u`` are distances of points drawn evenly in the bounding box to the nearest
    sample, ``w`` distances of drawn samples to the nearest other. ``share`` of the samples are drawn by
    ``seed`` (5 %: Lawson and Jurs 1990); distances enter in the first power, as in the code of Yang et al.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UDAError(f"The Hopkins statistic needs features [N, F], N >= 2, got {tuple(features.shape)}.")
    x = features.detach().cpu().double()
    random = torch.Generator().manual_seed(seed)
    m = max(1, int(share * len(x)))
    low, high = x.min(0).values, x.max(0).values
    points = low + (high - low) * torch.rand(m, x.shape[1], generator=random, dtype=torch.float64)
    chosen = torch.randperm(len(x), generator=random)[:m]
    exact = "donot_use_mm_for_euclid_dist"  # the fast way loses small distances to rounding
    mode = exact if x.shape[1] <= 64 else "use_mm_for_euclid_dist_if_necessary"
    u = torch.cdist(points, x, compute_mode=mode).min(1).values.sum()
    others = torch.cdist(x[chosen], x, compute_mode=mode)
    others[torch.arange(m), chosen] = torch.inf
    w = others.min(1).values.sum()
    return u / (u + w) if u + w > 0 else torch.full((), 0.5, dtype=torch.float64)


def transfer_score(features: Tensor, logits: Tensor, class_vectors: Tensor | None, seed: int = 0) -> Tensor:
    """``-U + H + M / log C``, at most 2 (Yang et al. 2024).

    Features ``[N, F]``, logits ``[N, C]``, classifier weights ``[C, F]``. U is :func:`classifier_unevenness`,
    H :func:`hopkins`, M the mutual information of the whole target; the authors' code averages M over
    batches, which is smaller where a batch has few classes. Fails where the three parts, added without
    weights, spread differently. Of a classifier that is not linear there are no class vectors (None): U is left
    out, so that epochs of one run compare, but not runs with and without.
    """
    m = information_maximisation(logits).cpu() / math.log(logits.shape[1])
    found = hopkins(features, seed=seed) + m
    return found if class_vectors is None else found - classifier_unevenness(class_vectors).cpu()


class TransferScore(PoolScore):
    """Metric form of :func:`transfer_score`; takes ``class_vectors`` ``[C, F]`` where the classifier has them."""

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool; NaN where there are no two target samples."""
        if len(pool.target_features) < 2:
            return torch.full((), torch.nan)
        return transfer_score(pool.target_features, pool.target_logits, pool.class_vectors, pool.seed)
