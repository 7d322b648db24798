"""Larger Norm More Transferable: adaptive feature norm (Xu et al., ICCV 2019)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.errors import check_choice
from uda.nn import full, no_autocast
from uda_discrepancy.base import Discrepancy


def feature_norms(features: Tensor) -> Tensor:
    """``|f_i|`` ``[B]``, float32."""
    with no_autocast(features):
        return torch.linalg.vector_norm(full(features), dim=1)


def stepwise_norm_loss(features: Tensor, step: float = 1.0) -> Tensor:
    """``mean_i (|f_i| - (r_i + step))^2`` with r_i the norm as a constant (SAFN; Xu et al. 2019, equation 5).

    Its value is always ``step^2``; its gradient lengthens each feature by the same pull ``-2 step / B``.
    """
    norms = feature_norms(features)
    return (norms - (norms.detach() + step)).square().mean()


def hard_norm_loss(features: Tensor, radius: float = 25.0) -> Tensor:
    """``(mean_i |f_i| - radius)^2`` (HAFN; Xu et al. 2019, equation 4)."""
    return (feature_norms(features).mean() - radius).square()


class AFN(Discrepancy):
    """Lengthen the features of both domains (Xu et al. 2019, equations 3 to 5).

    ``L = L_cls + weight * (N(f_s) + N(f_t))`` with one of the norm losses N. The objective of ``stepwise`` is a
    constant in value, and norms grow as long as training lasts. The paper's variant with entropy is this plugin
    beside ``EntropyMinimisation``. The published bottleneck is 1000 wide with dropout 0.5 that keeps norms.

    Args:
        weight: of the objective.
        variant: ``stepwise`` (SAFN) or ``hard`` (HAFN).
        step: length that SAFN adds (1.0; 0.3 on VisDA-2017).
        radius: norm that HAFN aims at.
        keep_norm: with dropout p in the bottleneck (``model.bottleneck_dropout``), scale features by ``sqrt(1 - p)``
            in training, so that dropout keeps the expected squared norm.
        ramp: as in :class:`~uda_discrepancy.base.Discrepancy`.
    """

    settings = ("closed", "partial", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.005, 0.5, "log"), "variant": ["stepwise", "hard"], "step": [0.1, 0.3, 1.0],
        "radius": (5.0, 50.0, "log"),
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 0.05,
        variant: str = "stepwise",
        step: float = 1.0,
        radius: float = 25.0,
        keep_norm: bool = True,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        check_choice("AFN", "variant", variant, ("stepwise", "hard"))
        if step <= 0 or radius <= 0:
            raise uda.UDAError("AFN: step and radius must be positive.")
        self.variant, self.step, self.radius, self.keep_norm = variant, step, radius, keep_norm
        self._scale = 1.0

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Look up the bottleneck's dropout."""
        rates = [m.p for m in model.bottleneck.modules() if isinstance(m, nn.Dropout)]
        self._scale = math.sqrt(1 - rates[-1]) if rates and self.keep_norm else 1.0

    @uda.hookimpl
    def transform_features(self, features: Tensor) -> Tensor | None:
        """Undo what dropout adds to the norms."""
        return features * self._scale if self.training and self._scale != 1.0 else None

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The norm objective of both domains, as one: neither makes sense alone."""
        source, target = step.pooled("features"), step.target.features
        self.log_later(
            source_norm=lambda: feature_norms(source).mean(), target_norm=lambda: feature_norms(target).mean()
        )
        if self.variant == "hard":
            value = hard_norm_loss(source, self.radius) + hard_norm_loss(target, self.radius)
        else:
            value = stepwise_norm_loss(source, self.step) + stepwise_norm_loss(target, self.step)
        return {"norm": self.scaled(step, value)}
