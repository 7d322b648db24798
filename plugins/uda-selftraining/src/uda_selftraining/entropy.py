"""Entropy minimisation (Grandvalet & Bengio, NeurIPS 2005) and information maximisation (Krause et al. 2010)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.losses import information_maximisation, mean_entropy
from uda.nn import ramp as ramp_factor


class EntropyMinimisation(uda.Plugin):
    """Make target predictions confident.

    ``mean_i H(p_i)`` in nats, and with ``diversity`` minus the entropy of the mean prediction, which keeps the classes
    in use (information maximisation; Krause et al. 2010, equation 4; SHOT's L_IM).

    Args:
        weight: of the objective. Entropy alone tends to collapse at large weights; the field uses 0.01 to 0.1.
        diversity: maximise the entropy of the mean prediction as well.
        ramp: growth of the weight over the run's progress: ``none``, ``linear``, ``warm_start``.
    """

    settings = ("closed", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.01, 1.0, "log"), "diversity": [False, True]}

    def __init__(self, weight: float = 0.1, diversity: bool = False, ramp: str = "none") -> None:
        super().__init__()
        if weight < 0:
            raise uda.UDAError("EntropyMinimisation: weight must not be negative.")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.diversity, self.ramp = weight, diversity, ramp
        if not diversity:  # which would spread a target that lacks classes over all of them
            self.settings = (*type(self).settings, "partial")

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The entropy objective; with ``diversity`` shifted by log C, so that it is never negative."""
        logits = step.target.logits
        weight = self.weight * ramp_factor(self.ramp, step.progress)
        if self.diversity:
            value = math.log(logits.shape[1]) - information_maximisation(logits)
            return {"information": weight * value}
        return {"entropy": weight * mean_entropy(logits)}
