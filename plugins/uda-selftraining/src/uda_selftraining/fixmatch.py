"""FixMatch as unsupervised domain adaptation (Sohn et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.nn import ramp as ramp_factor
from uda.pseudo import pseudo_cross_entropy
from uda_selftraining.pseudo_label import confident_labels


class FixMatch(uda.Plugin):
    """Train the strong view of a target sample on the label that its weak view gets (Sohn et al. 2020, equation 4).

    ``1/B sum_i 1[max_c p(weak_i) > threshold] CE(p(strong_i), argmax_c p(weak_i))``. The mean is over the whole batch,
    so that the objective is small as long as few samples are sure. The labels of the weak view stand at
    ``step.target.pseudo`` for other plugins as well; where an earlier plugin of the config has labelled the batch, its
    labels are used.

    The weak view is forwarded in training mode without a gradient: BatchNorm's running statistics see it. With
    ``model.forward_mode: separate`` there are three forwards (source, weak, strong) as in the reference; with ``joint``
    the plain view of the target is forwarded along with the source.

    Args:
        weight: of the objective (1).
        threshold: smallest probability of a label that is trained on. 0.95 in the paper; 0.9 (Office) and 0.8 (VisDA)
            are the usual ones between domains.
        ramp: growth of the weight over the run's progress: ``none`` (the paper), ``linear``, ``warm_start``.
    """

    settings = ("closed", "partial", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 3.0, "log"), "threshold": [0.7, 0.8, 0.9, 0.95]}

    def __init__(self, weight: float = 1.0, threshold: float = 0.9, ramp: str = "none") -> None:
        super().__init__()
        if weight < 0 or not 0 <= threshold < 1:
            raise uda.UDAError("FixMatch: weight must not be negative, and threshold must be in [0, 1).")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.threshold, self.ramp = weight, threshold, ramp

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Two views of the target."""
        return uda.DataNeeds(views={"weak", "strong"})

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """Labels of the weak view."""
        with torch.no_grad():
            return confident_labels(step.target.view("weak").logits, self.threshold)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The strong view on the labels."""
        pseudo = step.target.pseudo
        if pseudo.keep is not None:  # a share that falls to zero, or jumps to one at once, is the usual failure
            self.log_later(kept=lambda: pseudo.keep.float().mean())
        loss = pseudo_cross_entropy(step.target.view("strong").logits, pseudo)
        return {"strong": self.weight * ramp_factor(self.ramp, step.progress) * loss}
