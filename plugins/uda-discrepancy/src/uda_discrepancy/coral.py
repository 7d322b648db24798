"""Deep CORAL: Correlation Alignment for Deep Domain Adaptation (Sun & Saenko, ECCV Workshops 2016)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.errors import check_choice
from uda.nn import full, no_autocast
from uda_discrepancy.base import Discrepancy


def covariance(x: Tensor) -> Tensor:
    """Unbiased covariance ``[d, d]`` of ``[B, d]``, float32."""
    with no_autocast(x):
        x = full(x)
        x = x - x.mean(0)
        return x.T @ x / max(len(x) - 1, 1)


def coral_loss(source: Tensor, target: Tensor, normalise: str = "paper") -> Tensor:
    """``|C_s - C_t|_F^2 / (4 d^2)`` (Sun & Saenko 2016, equation 1).

    Args:
        source: ``[n, d]``; target: ``[m, d]``.
        normalise: ``paper`` divides by 4 d^2, ``none`` does not.
    """
    with no_autocast(source):
        gap = (covariance(source) - covariance(target)).square().sum()
        return gap / (4 * source.shape[1] ** 2) if normalise == "paper" else gap


def mean_loss(source: Tensor, target: Tensor) -> Tensor:
    """``|mu_s - mu_t|^2 / d`` for ``[n, d]`` and ``[m, d]``."""
    with no_autocast(source):
        return (full(source).mean(0) - full(target).mean(0)).square().mean()


class CORAL(Discrepancy):
    """Match second-order statistics (Sun & Saenko 2016, equations 1 to 6).

    ``L = L_cls + weight * |C_s - C_t|_F^2 / (4 d^2)``. The paper puts it on the classifier's output and chooses the
    weight such that both losses are about equal at the end of training. On features ``[B, d]`` of large d the
    division by d^2 makes it tiny: see ``normalise``.

    Args:
        layer: ``logits`` (the paper) or ``features``.
        normalise: ``paper`` divides by 4 d^2, ``none`` takes ``|C_s - C_t|_F^2`` as it is.
        means: match the means as well, by ``|mu_s - mu_t|^2 / d`` (not in the paper; common in re-implementations).
        weight, ramp: as in :class:`~uda_discrepancy.base.Discrepancy`.
    """

    search_space: ClassVar[dict[str, Any]] = {
        **Discrepancy.search_space, "layer": ["logits", "features"], "means": [False, True],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        layer: str = "logits",
        normalise: str = "paper",
        means: bool = False,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        check_choice("CORAL", "layer", layer, ("logits", "features"))
        check_choice("CORAL", "normalise", normalise, ("paper", "none"))
        self.layer, self.normalise, self.means = layer, normalise, means

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The distance of the covariances, and that of the means where wanted."""
        source, target = step.pooled(self.layer), getattr(step.target, self.layer)
        if min(len(source), len(target)) < 2:
            raise uda.UDAError("CORAL needs two samples of each domain in a batch: raise data.batch_size.")
        found = {"coral": self.scaled(step, coral_loss(source, target, self.normalise))}
        if self.means:
            found["mean"] = self.scaled(step, mean_loss(source, target))
        return found
