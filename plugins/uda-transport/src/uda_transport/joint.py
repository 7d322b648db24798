"""Transport of features and labels together: what DeepJDOT and JUMBOT share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

import uda
from uda.kernels import squared_distances
from uda.losses import class_distributions
from uda.nn import full, no_autocast
from uda.weighted import Weighted


def label_costs(y: Tensor, logits: Tensor, kind: str = "cross_entropy") -> Tensor:
    """Cost of giving each target sample each source label, ``[n]`` or ``[n, C]``, ``[m, C]`` -> ``[n, m]``.

    Args:
        y: class ids ``[n]`` or distributions ``[n, C]`` of the source.
        logits: of the target ``[m, C]``.
        kind: ``cross_entropy``, ``-sum_c y_ic log p_jc``; ``squared``, ``|y_i - p_j|^2``.
    """
    with no_autocast(logits):
        logits = full(logits)
        y = class_distributions(y, logits.shape[1], logits.dtype)
        if kind == "squared":
            return squared_distances(y, logits.softmax(1))
        return -y @ logits.log_softmax(1).T


class JointTransport(Weighted, ABC):
    """A cost ``alpha |g_s - g_t|^2 + label_weight CE(y_s, f(g_t))`` under a plan that a subclass finds.

    Several sources are pooled.

    Args:
        weight, ramp: of the objective; see :class:`~uda.weighted.Weighted`.
        alpha: of the squared distance of features.
        label_weight: of the cross-entropy of the source's label with the target's prediction.
    """

    settings = ("closed", "multi-source")

    def __init__(self, weight: float, alpha: float, label_weight: float, ramp: str) -> None:
        super().__init__(weight, ramp)
        if alpha < 0 or label_weight < 0 or alpha + label_weight == 0:
            raise uda.UDAError(
                f"{type(self).__name__}: the weights of features and labels must not be negative, and not both zero; "
                f"got {alpha} and {label_weight}."
            )
        self.alpha, self.label_weight = alpha, label_weight

    @abstractmethod
    def plan(self, cost: Tensor, features: Tensor, step: uda.Step) -> Tensor:
        """The plan ``[n, m]`` for the joint cost, of which ``features`` is the part of the features."""

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The transport cost."""
        logits, y = step.target.logits, step.pooled("y")
        with no_autocast(logits):
            features = self.alpha * squared_distances(step.pooled("features"), step.target.features)
            cost = features + self.label_weight * label_costs(y, logits)
            plan = self.plan(cost.detach(), features.detach(), step).to(cost.dtype)
            value = (plan * cost).sum()
        self.log_later(
            mass=plan.sum,
            feature_cost=lambda: (plan * features.detach()).sum(),
            label_agreement=lambda: agreement(plan, y, logits.detach()),
        )
        return {"transport": self.scaled(step, value)}


def agreement(plan: Tensor, y: Tensor, logits: Tensor) -> Tensor:
    """Share of the plan's mass that joins a source label with a target sample of that predicted class."""
    same = (y if y.ndim == 1 else y.argmax(1))[:, None] == logits.argmax(1)
    return (plan * same).sum() / plan.sum().clamp_min(torch.finfo(plan.dtype).tiny)
