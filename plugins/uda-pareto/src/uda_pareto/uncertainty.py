"""Weights from homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda_pareto.combiner import SETTINGS
from uda_pareto.fixed import check_names


class UncertaintyWeights(uda.Plugin):
    """Learnt weights ``exp(-s_i)`` with log-variances ``s_i = log sigma_i^2`` (Kendall et al. 2018, equation 10).

    ``sum_i exp(-s_i) L_i + s_i / 2``: an objective that stays large is taken for noisy and weighs less; the second term
    keeps the variances from growing. The weights are constants for the net, and the log-variances learn with a
    parameter group of their own by ``dL/ds_i = 1/2 - exp(-s_i) L_i``, whose fixed point is ``exp(s_i) = 2 L_i``. Heads
    and discriminators keep their plain gradients. Objectives must not be negative, or their weight grows to the limit.

    Args:
        objectives: names of the weighed objectives, as in the training curves: ``classification``,
            ``<key>/<objective>``. The others weigh 1.
        lr_scale: learning rate of the log-variances relative to the head's.
        start: first value of all log-variances.
        limit: largest absolute log-variance.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {"lr_scale": (0.01, 10.0, "log")}

    def __init__(
        self, objectives: list[str] | None = None, lr_scale: float = 1.0, start: float = 0.0, limit: float = 5.0
    ) -> None:
        super().__init__()
        names = ["classification"] if objectives is None else [str(n) for n in objectives]
        if not names or len(set(names)) < len(names):
            raise uda.UDAError("UncertaintyWeights: objectives must be distinct names, at least one.")
        if lr_scale < 0 or limit <= 0 or abs(start) > limit:
            raise uda.UDAError("UncertaintyWeights: lr_scale must not be negative, limit positive, |start| within it.")
        self.names, self.lr_scale, self.limit = names, lr_scale, limit
        self.log_variance = nn.Parameter(torch.full((len(names),), float(start)))

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Check the names."""
        check_names(model, self.names, self.key)

    @uda.hookimpl
    def param_groups(self) -> list[dict[str, Any]]:
        """Log-variances at their own rate, without weight decay (which would pull all weights to 1)."""
        return [{"name": self.key, "params": [self.log_variance], "lr_scale": self.lr_scale, "weight_decay": 0.0}]

    @uda.hookimpl
    def refine_classifier(self) -> dict[str, Tensor]:
        """The term that keeps the variances from growing."""
        return {"log_variance": self.log_variance.sum() / 2}

    @uda.hookimpl
    def weigh_objectives(self) -> dict[str, Tensor]:
        """``exp(-s_i)``, with gradient: the log-variances learn through it, the net takes it as a constant."""
        return dict(zip(self.names, (-self.log_variance).exp(), strict=True))

    @uda.hookimpl
    def after_step(self) -> None:
        """Back within the limit; a clamp in the loss would leave what is beyond without a gradient."""
        self.log_variance.clamp_(-self.limit, self.limit)
