"""Minimum Class Confusion for Versatile Domain Adaptation (Jin et al., ECCV 2020)."""

from __future__ import annotations

from torch import Tensor

import uda
from uda.losses import minimum_class_confusion
from uda.nn import warm_start


class MCC(uda.Plugin):
    """Make pairwise confusion between classes on the target small (Jin et al. 2020, equations 3 to 8).

    Needs no pseudo-label, and composes with any aligner.

    Args:
        weight: of the objective (the paper: 1).
        temperature: softens the predictions before confusion is counted (2.5; 3 on VisDA, 2 on DomainNet).
        gamma: steepness of a warm start ``2 / (1 + exp(-gamma p)) - 1`` over the run's progress; 0 for none, as
            in the paper.
    """

    settings = ("closed", "partial", "multi-source", "source-free")
    search_space = {"weight": (0.1, 3.0, "log"), "temperature": (1.0, 4.0)}

    def __init__(self, weight: float = 1.0, temperature: float = 2.5, gamma: float = 0.0) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0:
            raise uda.UDAError("MCC: weight must not be negative, and temperature must be positive.")
        self.weight, self.temperature, self.gamma = weight, temperature, gamma

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The confusion objective."""
        ramp = warm_start(step.progress, self.gamma) if self.gamma else 1.0
        return {"confusion": self.weight * ramp * minimum_class_confusion(step.target.logits, self.temperature)}
