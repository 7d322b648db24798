"""Scores from the spectrum of predictions or features: BNM, class correlation, RankMe."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from uda.errors import UDAError
from uda.selection.pool import PoolScore, ScorePool
from uda.selection.sums import PredictionSums, Sums

EPSILON = 1e-7  # of RankMe, Eq. 2, for float32 features


def singular_values(gram: Tensor) -> Tensor:
    """Singular values of ``P`` from ``P^T P`` ``[C, C]`` in float64, ascending."""
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


def effective_rank(values: Tensor, epsilon: float = EPSILON) -> Tensor:
    """``exp H(s / |s|_1 + epsilon)`` of singular values, 1 to their number (Garrido et al. 2023, Eq. 1-2).

    All zero (or no) values give 0.
    """
    total = values.sum()
    if not total > 0:
        return values.new_zeros(())
    p = values / total + epsilon
    return torch.exp(-(p * p.log()).sum())


def bnm(logits: Tensor) -> Tensor:
    """Nuclear norm of the softmax predictions over its largest value; logits ``[N, C]``, in ``(0, 1]``.

    ``|P|_* / sqrt(N min(N, C))`` (Cui et al. 2020). They divide by N, the same up to a constant factor for
    one target; this bound makes targets comparable. It is 1 for confident and balanced predictions. Fails as
    information maximisation does: where it is trained on, and on unbalanced targets.
    """
    return BNM.score(Sums.of(logits))


def class_correlation(logits: Tensor) -> Tensor:
    """Cosine of ``P^T P`` with the identity; logits ``[N, C]``, in ``[1 / sqrt(C), 1]`` (Tu et al. 2023).

    1 for confident and balanced predictions, ``1 / sqrt(C)`` for constant ones. The MixVal repository prints
    the same number up to the factor ``sqrt(C)`` with the remark that the smallest is best; the paper and
    this definition say the largest.
    Fails on unbalanced targets, since the identity stands for equal classes.
    """
    return ClassCorrelation.score(Sums.of(logits))


def rankme(features: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Effective rank of target features ``[N, F]``; in ``[1, min(N, F)]`` (Garrido et al. 2023).

    The features are neither centred nor normalised, as in the paper. It was made for self-supervised
    features; fails between supervised models, whose good features cluster by class and have a low rank.
    """
    if features.ndim != 2 or not len(features):
        raise UDAError(f"RankMe needs features [N, F], got shape {tuple(features.shape)}.")
    x = features.detach().double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    return effective_rank(singular_values(gram), epsilon)


class BNM(PredictionSums):
    """Metric form of :func:`bnm`."""

    @staticmethod
    def score(sums: Sums) -> Tensor:
        """From sums."""
        n = float(sums.n)
        return singular_values(sums.gram).sum() / math.sqrt(n * min(n, len(sums.p)))

    def compute(self) -> Tensor:
        """Scalar in ``(0, 1]``."""
        return self.score(self.sums())


class ClassCorrelation(PredictionSums):
    """Metric form of :func:`class_correlation`."""

    @staticmethod
    def score(sums: Sums) -> Tensor:
        """From sums."""
        return sums.gram.trace() / (sums.gram.norm() * math.sqrt(len(sums.p)))

    def compute(self) -> Tensor:
        """Scalar in ``[1 / sqrt(C), 1]``."""
        return self.score(self.sums())


class RankMe(PoolScore):
    """Metric form of :func:`rankme`."""

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool."""
        return rankme(pool.target_features)
