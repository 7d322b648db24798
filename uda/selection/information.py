"""Scores from entropies of the target predictions, in nats. Read from running sums."""

from __future__ import annotations

import torch
from torch import Tensor

from uda.selection.sums import PredictionSums, Sums


def _of_mean(sums: Sums) -> Tensor:
    mean = sums.p / sums.n
    return -torch.special.xlogy(mean, mean).sum()


def negative_entropy(logits: Tensor) -> Tensor:
    """``-mean_i H(p_i)`` of target logits ``[N, C]``; in ``[-log C, 0]`` (Morerio et al. 2018).

    skada's scorer divides by C as well, since it averages over samples and classes. Fails where predictions
    are confident and wrong: it is largest for a model that puts everything in one class.
    """
    return NegativeEntropy.score(Sums.of(logits))


def diversity(logits: Tensor) -> Tensor:
    """``H(mean_i p_i)`` of target logits ``[N, C]``; in ``[0, log C]`` (Musgrave et al. 2022).

    Fails alone: it is largest for predictions that carry no information, and it misleads where the target's
    classes are unbalanced or some are absent (partial).
    """
    return Diversity.score(Sums.of(logits))


def information_maximisation(logits: Tensor) -> Tensor:
    """``H(mean_i p_i) - mean_i H(p_i)`` of target logits ``[N, C]``; in ``[0, log C]``.

    The mutual information of input and predicted class (Krause et al. 2010; as a validator Musgrave et al.
    2022). Fails where a method maximises it in training (SHOT, MCC), and on unbalanced targets, as diversity
    does.
    """
    return InformationMaximisation.score(Sums.of(logits))


class NegativeEntropy(PredictionSums):
    """Metric form of :func:`negative_entropy`."""

    @staticmethod
    def score(sums: Sums) -> Tensor:
        """From sums."""
        return -sums.h / sums.n

    def compute(self) -> Tensor:
        """Scalar in ``[-log C, 0]``."""
        return self.score(self.sums())


class Diversity(PredictionSums):
    """Metric form of :func:`diversity`."""

    @staticmethod
    def score(sums: Sums) -> Tensor:
        """From sums."""
        return _of_mean(sums)

    def compute(self) -> Tensor:
        """Scalar in ``[0, log C]``."""
        return self.score(self.sums())


class InformationMaximisation(PredictionSums):
    """Metric form of :func:`information_maximisation`."""

    @staticmethod
    def score(sums: Sums) -> Tensor:
        """From sums."""
        return _of_mean(sums) - sums.h / sums.n

    def compute(self) -> Tensor:
        """Scalar in ``[0, log C]``."""
        return self.score(self.sums())
