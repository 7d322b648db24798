"""Sinkhorn divergence of features (Genevay et al., AISTATS 2018; Feydy et al., AISTATS 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.kernels import squared_distances
from uda.nn import full, no_autocast
from uda.weighted import Weighted
from uda_transport.solvers import entropic_plan


def entropic_cost(cost: Tensor, epsilon: Tensor | float, max_iter: int = 500, tol: float = 1e-4) -> Tensor:
    """``min_P <C, P> + eps KL(P | a b^T)`` between uniform weights; its gradient in C is the plan.

    Args:
        cost: ``[n, m]``; epsilon: in units of the cost, a constant.
        max_iter, tol: see :func:`~uda_transport.solvers.entropic_plan`.
    """
    plan = entropic_plan(cost, epsilon, max_iter, tol)
    entropy = (plan * (plan * plan.numel()).clamp_min(1e-300 if plan.dtype.itemsize == 8 else 1e-38).log()).sum()
    return (plan.to(cost.dtype) * cost).sum() + (epsilon * entropy).to(cost.dtype)


def sinkhorn_divergence(
    source: Tensor, target: Tensor, epsilon: float = 0.05, debias: bool = True, max_iter: int = 500, tol: float = 1e-4
) -> Tensor:
    """``OT(s, t) - OT(s, s) / 2 - OT(t, t) / 2`` with entropic transport of squared distances (Feydy et al. 2019).

    Args:
        source: ``[n, F]``; target: ``[m, F]``.
        epsilon: of the entropy, as a share of the mean squared distance between the domains (a constant), so that
            scaling all features by k scales the divergence by k^2.
        debias: take off the two inner terms, which makes it zero for equal batches and never negative. Without them it
            is the entropic cost, whose minimum draws each domain towards its mean.
        max_iter, tol: when the solver stops.

    Returns:
        Scalar in units of squared distance.
    """
    with no_autocast(source):
        source, target = full(source), full(target)
        cross = squared_distances(source, target)
        absolute = epsilon * cross.detach().mean().clamp_min(1e-12)
        value = entropic_cost(cross, absolute, max_iter, tol)
        if debias:
            for own in (squared_distances(source), squared_distances(target)):
                value = value - entropic_cost(own, absolute, max_iter, tol) / 2
        return value


class Sinkhorn(Weighted):
    """Make the domains' features alike in transport distance, without labels.

    ``L = L_cls + weight * ramp(p) * S(g_s, g_t)`` with the Sinkhorn divergence S of squared distances. Several sources
    are pooled.

    Args:
        weight: of the objective; it multiplies squared distances, so it depends on the scale of the features.
        epsilon: of the entropy, as a share of the mean squared distance between the domains. Large values approach
            the squared distance of the means, small ones exact transport (and need more iterations).
        debias: the divergence; otherwise the entropic cost itself.
        max_iter, tol: when the solver stops.
        ramp: growth of the weight over the run.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.001, 0.1, "log"), "epsilon": (0.01, 1.0, "log"), "ramp": ["none", "linear", "warm_start"],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 0.01,
        epsilon: float = 0.05,
        debias: bool = True,
        max_iter: int = 500,
        tol: float = 1e-4,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        if min(epsilon, tol) <= 0 or max_iter < 1:
            raise uda.UDAError("Sinkhorn: epsilon and tol must be positive, and max_iter 1 or more.")
        self.epsilon, self.debias, self.max_iter, self.tol = epsilon, debias, max_iter, tol

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The divergence."""
        value = sinkhorn_divergence(
            step.pooled("features"), step.target.features, self.epsilon, self.debias, self.max_iter, self.tol
        )
        return {"sinkhorn": self.scaled(step, value)}
