"""Scores from running sums: one pass, no memory that grows with the domain."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def _mean_entropy(logits: Tensor) -> Tensor:
    log_p = logits.float().log_softmax(1)
    return -(log_p.exp() * log_p).sum(1).mean()


def _entropy_of_mean(logits: Tensor) -> Tensor:
    mean = logits.float().softmax(1).mean(0)
    return -torch.special.xlogy(mean, mean).sum()


def negative_entropy(logits: Tensor) -> Tensor:
    """``-mean_i H(p_i)`` of target predictions, logits ``[N, C]``; in ``[-log C, 0]``, nats (Morerio et al. 2018)."""
    return -_mean_entropy(logits)


def diversity(logits: Tensor) -> Tensor:
    """``H(mean_i p_i)`` of target predictions, logits ``[N, C]``; in ``[0, log C]``, nats."""
    return _entropy_of_mean(logits)


def information_maximisation(logits: Tensor) -> Tensor:
    """``H(mean_i p_i) - mean_i H(p_i)``, logits ``[N, C]``; in ``[0, log C]``, nats.

    The mutual information of input and predicted class (Krause et al. 2010; as a validator Musgrave et al. 2022).
    """
    return _entropy_of_mean(logits) - _mean_entropy(logits)


class _EntropySums(Metric):
    """Running sums that all three scores are made of."""

    higher_is_better = True
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("p", torch.zeros(1), dist_reduce_fx="sum")  # takes the width of the first batch
        self.add_state("h", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("n", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Logits ``[B, C]`` of a batch."""
        log_p = logits.detach().float().log_softmax(1)
        p = log_p.exp()
        self.p = self.p + p.sum(0)
        self.h = self.h - (p * log_p).sum()
        self.n = self.n + len(logits)

    def _parts(self) -> tuple[Tensor, Tensor]:
        mean = self.p / self.n
        return -torch.special.xlogy(mean, mean).sum(), self.h / self.n


class InformationMaximisation(_EntropySums):
    """Metric form of :func:`information_maximisation`."""

    def compute(self) -> Tensor:
        """Scalar in ``[0, log C]``."""
        of_mean, mean = self._parts()
        return of_mean - mean


class NegativeEntropy(_EntropySums):
    """Metric form of :func:`negative_entropy`."""

    def compute(self) -> Tensor:
        """Scalar in ``[-log C, 0]``."""
        return -self._parts()[1]


class Diversity(_EntropySums):
    """Metric form of :func:`diversity`."""

    def compute(self) -> Tensor:
        """Scalar in ``[0, log C]``."""
        return self._parts()[0]
