"""Entropy minimisation (Grandvalet & Bengio, NeurIPS 2005) and information maximisation (Krause et al. 2010)."""

from __future__ import annotations

import math

from torch import Tensor

import uda
from uda.losses import information_maximisation, mean_entropy
from uda.nn import warm_start


class EntropyMinimisation(uda.Plugin):
    """Make target predictions confident.

    ``mean_i H(p_i)`` in nats, and with ``diversity`` minus the entropy of the mean prediction, which keeps the classes
    in use (information maximisation; Krause et al. 2010, equation 4; SHOT's L_IM).

    Args:
        weight: of the objective. Entropy alone tends to collapse at large weights; the field uses 0.01 to 0.1.
        diversity: maximise the entropy of the mean prediction as well.
        gamma: steepness of a warm start over the run's progress; 0 for none.
    """

    settings = ("closed", "multi-source", "source-free")
    search_space = {"weight": (0.01, 1.0, "log"), "diversity": [False, True]}

    def __init__(self, weight: float = 0.1, diversity: bool = False, gamma: float = 0.0) -> None:
        super().__init__()
        if weight < 0:
            raise uda.UDAError("EntropyMinimisation: weight must not be negative.")
        self.weight, self.diversity, self.gamma = weight, diversity, gamma

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The entropy objective; with ``diversity`` shifted by log C, so that it is never negative."""
        logits = step.target.logits
        ramp = warm_start(step.progress, self.gamma) if self.gamma else 1.0
        if self.diversity:
            value = math.log(logits.shape[1]) - information_maximisation(logits)
            return {"information": self.weight * ramp * value}
        return {"entropy": self.weight * ramp * mean_entropy(logits)}
