"""Learning Transferable Features with Deep Adaptation Networks (Long et al., ICML 2015)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.errors import check_choice
from uda.kernels import ESTIMATORS, multi_kernel_mmd
from uda_discrepancy.base import KernelDiscrepancy

LAYERS = ("features", "logits", "both")


class DAN(KernelDiscrepancy):
    """Match the domains' features in several kernels (Long et al. 2015, equation 5).

    ``L = L_cls + weight * sum_layers MMD^2(f_s, f_t)``. The kernels weigh equally; the paper's quadratic programme for
    their weights is left out, as in re-implementations. The paper takes all task-specific layers (``layers: both``),
    re-implementations the bottleneck alone. ``model.forward_mode`` decides whether the domains share BatchNorm
    statistics; re-implementations pass them separately.

    Args:
        layers: ``features``, ``logits``, or ``both`` (the sum).
        estimator: of the MMD: ``unbiased``, ``biased``, ``linear`` (the paper, for its cost) or ``circular``
            (re-implementations). The first has the same mean as the last two and far less noise, at a cost that does
            not show at usual batch sizes. See :func:`uda.kernels.discrepancy`.
        others: as in :class:`~uda_discrepancy.base.KernelDiscrepancy`.
    """

    search_space: ClassVar[dict[str, Any]] = {
        **KernelDiscrepancy.search_space, "layers": ["features", "both"], "estimator": ["unbiased", "biased"],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        layers: str = "features",
        estimator: str = "unbiased",
        kernels: int = 5,
        factor: float = 2.0,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, kernels, factor, ramp)
        check_choice("DAN", "layers", layers, LAYERS)
        check_choice("DAN", "estimator", estimator, ESTIMATORS)
        self.layers, self.estimator = layers, estimator

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """One objective for each layer."""
        names = ("features", "logits") if self.layers == "both" else (self.layers,)
        return {
            f"mmd_{name}": self.scaled(
                step,
                multi_kernel_mmd(
                    step.pooled(name), getattr(step.target, name), self.estimator, self.kernels, self.factor
                ),
            )
            for name in names
        }
