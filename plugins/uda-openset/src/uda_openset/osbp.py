"""Open Set Domain Adaptation by Backpropagation (OSBP: Saito et al., ECCV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import reverse_gradient, warm_start
from uda_openset.unknown import UnknownClass, unknown_logit


def boundary_loss(d: Tensor, threshold: float = 0.5) -> Tensor:
    """``mean -t log p - (1 - t) log(1 - p)`` with ``p = sigmoid(d)`` the probability of unknown (equation 2).

    Args:
        d: of :func:`~uda_openset.unknown.unknown_logit` on target samples ``[B]``; threshold: t.
    """
    return F.binary_cross_entropy_with_logits(d, torch.full_like(d, threshold))


class OSBP(UnknownClass):
    """The classifier puts target samples on the boundary to a class "unknown"; features push them to either side.

    ``CE over K + 1 classes on the source + weight * boundary_loss(target)``, the latter behind gradient reversal: the
    classifier draws the probability of unknown to t, the features away from it, up or down (Saito et al. 2018,
    equations 1 to 4). The objective ``known`` is what the class K + 1 adds to the skeleton's cross-entropy.

    Args:
        weight: of the adversarial objective.
        threshold: t, 0.5 in all published runs.
        gamma: steepness of the reversal's warm start over the run's progress; 0: none, as in the paper and its code.
        reversal: final coefficient of the gradient reversal.
        lr_scale: learning rate of the logit's weights relative to the head's.
    """

    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 3.0, "log"), "gamma": [0.0, 1.0, 10.0]}

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float = 0.5,
        gamma: float = 10.0,
        reversal: float = 1.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(lr_scale)
        if min(weight, reversal, gamma) < 0 or not 0 < threshold < 1:
            raise uda.UDAError(
                "OSBP: weight, gamma and reversal must not be negative, and threshold lies between 0 and 1."
            )
        self.weight, self.threshold, self.gamma, self.reversal = weight, threshold, gamma, reversal

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Known on the source, and the boundary on the target."""
        coefficient = self.reversal * (warm_start(step.progress, self.gamma) if self.gamma else 1.0)
        features = reverse_gradient(step.target.features, coefficient)
        d = unknown_logit(step.model.head(features), self.unknown(features))
        self.log_later(unknown_share=lambda: (d > 0).float().mean(), reversal=coefficient)
        return {"known": self.source_known(step), "boundary": self.weight * boundary_loss(d, self.threshold)}
