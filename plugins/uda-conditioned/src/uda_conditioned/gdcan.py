"""Generalized Domain Conditioned Adaptation Network (Li et al., TPAMI 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.nn import gather_rows
from uda_conditioned.attention import ConditionedLayer, decide, merge
from uda_conditioned.dcan import DCAN


class GDCAN(DCAN):
    """DCAN in which each attention module decides by itself whether the target has a branch of its own.

    With ``r = mean / sqrt(variance)`` over all entries of a domain's channel descriptors, the target takes the sources'
    branch where ``tanh(|r_s - r_t| / |r_t|) < threshold``. The authors' code takes the statistics of each batch and
    leaves the last decision to inference, unsaved; here they are running means over the steps and all processes, the
    decision holds for the next step, and both are buffers of the network.

    Args:
        threshold: eta (the authors' code: 0.2); 0 is DCAN, 1 shares all attention.
        momentum: of the running statistics; 0 decides by the last batch alone.
        others: as in :class:`~uda_conditioned.dcan.DCAN`.
    """

    gated = True
    search_space: ClassVar[dict[str, Any]] = {**DCAN.search_space, "threshold": [0.1, 0.2, 0.4]}

    def __init__(
        self,
        threshold: float = 0.2,
        momentum: float = 0.9,
        weight: float = 1.5,
        entropy_weight: float = 0.1,
        where: str | Sequence[str] = "auto",
        reduction: int = 16,
        regulariser: str = "random",
        random_prob: float = 0.8,
        estimator: str = "biased",
        hidden: int = 128,
        adapt_lr_scale: float = 0.001,
        attention_lr_scale: float = 1.0,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__(
            weight, entropy_weight, where, reduction, regulariser, random_prob, estimator, hidden, adapt_lr_scale,
            attention_lr_scale, freeze_norm,
        )  # fmt: skip
        if not 0 <= threshold <= 1 or not 0 <= momentum < 1:
            raise uda.UDAError("GDCAN: threshold must lie in [0, 1] and momentum in [0, 1).")
        self.threshold, self.momentum = threshold, momentum

    @staticmethod
    def _layers(step: uda.Step) -> list[ConditionedLayer]:
        return [m for m in step.model.backbone.modules() if isinstance(m, ConditionedLayer)]

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """DCAN's; notes the share of modules in which the domains share a branch."""
        if layers := self._layers(step):
            self.log_later(shared=lambda: torch.stack([layer.shared for layer in layers]).float().mean())
        return DCAN.refine_classifier(self, step)

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Statistics of this step from all processes, and the decision for the next."""
        if layers := self._layers(step):
            seen = torch.stack([layer.take_seen() for layer in layers])
            decide(layers, merge(gather_rows(seen[None])), self.threshold, self.momentum)
