"""Unsupervised Multi-source Domain Adaptation Without Access to Source Data (DECISION: Ahmed et al., CVPR 2021)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from uda_sourcefree.shot import centroids

import uda
from uda.kernels import squared_distances
from uda.losses import log_mean_probs, mean_entropy
from uda.nn import full
from uda.pseudo import pseudo_cross_entropy
from uda_multisource.experts import Experts


class LabelledExperts(Experts, ABC):
    """Base: experts, their weights learnt, and a label for each target sample, made anew at the start of each epoch.

    ``label_weight * CE(z, y^) + entropy_weight * (mean H(p) - H(mean p))`` on the joined logits ``z = sum_i w_i z_i``.

    Args:
        checkpoints, inputs, architectures: as in :class:`~uda_multisource.experts.Experts`.
        label_weight, entropy_weight: of the two objectives.
        rounds: how often centroids are made.
    """

    search_space: ClassVar[dict[str, Any]] = {"label_weight": (0.03, 1.0, "log")}
    labels: Tensor

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None,
        architectures: list[dict[str, Any]] | None,
        label_weight: float,
        entropy_weight: float,
        rounds: int,
    ) -> None:
        super().__init__(checkpoints, inputs, architectures)
        if min(label_weight, entropy_weight) < 0 or rounds < 1:
            raise uda.UDAError(f"{type(self).__name__}: weights must not be negative, and rounds must be 1 or more.")
        self.label_weight, self.entropy_weight, self.rounds = label_weight, entropy_weight, rounds

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The experts, and room for a label of each target sample.

        Raises:
            UDAError: experts whose features differ in width, so that they cannot be added.
        """
        super().build(model)
        if len(set(model.head.widths)) > 1:
            raise uda.UDAError(
                f"{type(self).__name__} adds the experts' features, whose widths are {model.head.widths}: use source "
                "models with one model.bottleneck."
            )
        if "labels" not in self._buffers:
            size = max(model.sizes.get(model.target_name, 0), 1)
            self.register_buffer("labels", torch.zeros(size, dtype=torch.long))

    @abstractmethod
    def make_labels(self, model: uda.UDA, features: Tensor, logits: Tensor) -> Tensor:
        """Labels ``[N]`` of the whole target, from features ``[N, M, F]`` and logits ``[N, M, C]`` of the experts."""

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Labels for the epoch."""
        features = bank.target.features
        logits = full(model.head.each(features))
        found = self.make_labels(model, features.unflatten(1, (logits.shape[1], -1)), logits)
        self.log_later(changed=(found != self.labels).float().mean())
        self.labels.copy_(found)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """The batch's labels."""
        return uda.PseudoLabels(self.labels[step.target.index])

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Labels and information."""
        logits = step.target.logits
        log_mean = log_mean_probs(logits, over_ranks=True)
        information = mean_entropy(logits) + (log_mean.exp() * log_mean).sum()
        self.log_later(**{f"weight_{i}": w for i, w in enumerate(step.model.head.weights.detach())})
        return {
            "labels": self.label_weight * pseudo_cross_entropy(logits, step.target.pseudo),
            "information": self.entropy_weight * information,
        }


def joint_centroid_labels(features: Tensor, logits: Tensor, weights: Tensor, rounds: int = 2) -> Tensor:
    """Class of the nearest joint centroid, ``[N]`` (Ahmed et al. 2021, equations 4 to 7).

    Each expert makes its centroids as SHOT does; centroids and features are then added by the experts' weights, and the
    Euclidean distance decides.

    Args:
        features: ``[N, M, F]``; logits: ``[N, M, C]``; weights: ``[M]``; rounds: of each expert's centroids.
    """
    features_sum, centres_sum, absent = 0.0, 0.0, None
    for i, w in enumerate(weights):
        f, centres, cosine = centroids(features[:, i], logits[:, i].softmax(1), rounds)
        features_sum, centres_sum = features_sum + w * f, centres_sum + w * centres
        none = cosine[0].isinf()
        absent = none if absent is None else absent & none  # a class that no expert predicts has no centroid
    distance = squared_distances(features_sum, centres_sum)
    return distance.masked_fill(absent, torch.inf).argmin(1)


class DECISION(LabelledExperts):
    """Several source models as one, their weights learnt on the target, labels by joint centroids (Ahmed et al. 2021).

    Each expert's weight is the same for all samples. Features and weights train, classifiers are frozen.

    Args:
        checkpoints, inputs, architectures: as in :class:`~uda_multisource.experts.Experts`.
        label_weight, entropy_weight: of ``CE(z, y^)`` and of information; published 0.3 and 1.
        rounds: of the centroids.
    """

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None = None,
        architectures: list[dict[str, Any]] | None = None,
        label_weight: float = 0.3,
        entropy_weight: float = 1.0,
        rounds: int = 2,
    ) -> None:
        super().__init__(checkpoints, inputs, architectures, label_weight, entropy_weight, rounds)

    def make_labels(self, model: uda.UDA, features: Tensor, logits: Tensor) -> Tensor:
        """By joint centroids."""
        return joint_centroid_labels(features, logits, model.head.weights, self.rounds)
