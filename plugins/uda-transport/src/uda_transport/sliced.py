"""Sliced Wasserstein distance of features (Rabin et al., 2011; Bonneel et al., JMIV 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.nn import full, no_autocast
from uda.weighted import Weighted

REDUCE = ("mean", "max")


def sliced_wasserstein(source: Tensor, target: Tensor, directions: Tensor, reduce: str = "mean") -> Tensor:
    """Squared 2-Wasserstein distance along directions, in units of squared distance.

    Args:
        source: ``[n, F]``; target: ``[m, F]``.
        directions: unit vectors ``[F, K]``.
        reduce: ``mean`` over the directions, or the ``max`` of them, a lower bound of the max-sliced distance
            (Deshpande et al., CVPR 2019).

    Returns:
        Scalar. The distance is not rooted: the root has no gradient where the domains coincide.
    """
    import ot

    with no_autocast(source):
        source, target = full(source), full(target)
        directions = directions.to(source.dtype)
        along = ot.lp.wasserstein_1d(source @ directions, target @ directions, p=2)
        return along.max() if reduce == "max" else along.mean()


class SlicedWasserstein(Weighted):
    """Make the domains' features alike along random directions: transport by sorting, with no solver.

    ``L = L_cls + weight * ramp(p) * mean_k W_2^2(theta_k . g_s, theta_k . g_t)`` with directions drawn anew in each
    step, uniform on the sphere. A shift of the mean by d counts ``|d|^2 / F``. Several sources are pooled.

    Args:
        weight: of the objective; it multiplies squared distances, so it depends on the scale of the features.
        projections: number of directions.
        reduce: ``mean``, or ``max``: only the direction in which the domains differ most.
        ramp: growth of the weight over the run.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {**Weighted.search_space, "reduce": list(REDUCE)}

    def __init__(
        self, weight: float = 1.0, projections: int = 128, reduce: str = "mean", ramp: str = "none"
    ) -> None:
        super().__init__(weight, ramp)
        check_choice("SlicedWasserstein", "reduce", reduce, REDUCE)
        if projections < 1:
            raise uda.UDAError(f"SlicedWasserstein: projections must be 1 or more, got {projections}.")
        self.projections, self.reduce = projections, reduce

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The distance along this step's directions."""
        source = step.pooled("features")
        # the skeleton has seeded the generator for this step, so that a resumed run draws the same
        directions = torch.randn(source.shape[1], self.projections, device=source.device)
        value = sliced_wasserstein(source, step.target.features, F.normalize(directions, dim=0), self.reduce)
        return {"sliced": self.scaled(step, value)}
