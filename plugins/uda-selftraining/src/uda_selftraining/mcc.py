"""Minimum Class Confusion for Versatile Domain Adaptation (Jin et al., ECCV 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.losses import minimum_class_confusion
from uda.nn import ramp as ramp_factor


class MCC(uda.Plugin):
    """Make pairwise confusion between classes on the target small (Jin et al. 2020, equations 3 to 8).

    Needs no pseudo-label, and composes with any aligner.

    Args:
        weight: of the objective (the paper: 1).
        temperature: softens the predictions before confusion is counted (2.5; 3 on VisDA, 2 on DomainNet).
        ramp: growth of the weight over the run's progress p: ``none`` (the paper), ``linear`` (p), ``warm_start``
            (2 / (1 + exp(-10 p)) - 1). Confident targets early in training fix the errors of an untrained classifier.
        detach: the certainty weights are constants, as in the authors' code; False: the gradient runs through them too.
            The paper's equations do not tell. The value is the same.
    """

    settings = ("closed", "partial", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 3.0, "log"), "temperature": (1.0, 4.0), "ramp": ["none", "linear"],
    }  # fmt: skip

    def __init__(
        self, weight: float = 1.0, temperature: float = 2.5, ramp: str = "none", detach: bool = True
    ) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0:
            raise uda.UDAError("MCC: weight must not be negative, and temperature must be positive.")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.temperature, self.detach, self.ramp = weight, temperature, detach, ramp

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The confusion objective."""
        weight = self.weight * ramp_factor(self.ramp, step.progress)
        return {"confusion": weight * minimum_class_confusion(step.target.logits, self.temperature, self.detach)}
