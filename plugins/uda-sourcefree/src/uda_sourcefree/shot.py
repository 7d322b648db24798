"""Source hypothesis transfer (SHOT: Liang, Hu and Feng, ICML 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.losses import class_distributions, log_mean_probs, mean_entropy
from uda.nn import full, no_autocast
from uda.pseudo import pseudo_cross_entropy


@torch.no_grad()
def centroids(
    features: Tensor, probs: Tensor, rounds: int = 2, threshold: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Centroids of the classes of a whole domain.

    Features get a column of ones and length 1. Centroids are means weighed by the class probabilities (equation 4),
    then by the labels that these give (equation 6).

    Args:
        features: ``[N, F]``; probs: ``[N, C]``; rounds: how often centroids are made, 2 in the paper.
        threshold: predicted samples that a class must exceed to have a centroid.

    Returns:
        Features ``[N, F + 1]``, centroids ``[C, F + 1]``, and the cosine of each sample with each of them ``[N, C]``,
        -inf where a class has none.
    """
    with no_autocast(features):
        f = F.normalize(torch.cat([full(features), torch.ones_like(full(features[:, :1]))], 1), dim=1)
        weight = full(probs)
        counts = torch.bincount(weight.argmax(1), minlength=weight.shape[1])
        absent = counts <= threshold
        if absent.all():
            absent = torch.zeros_like(absent)
        for _ in range(rounds):
            centres = weight.T @ f / (1e-8 + weight.sum(0)[:, None])
            cosine = (f @ F.normalize(centres, dim=1).T).masked_fill(absent, -torch.inf)
            weight = class_distributions(cosine.argmax(1), len(absent), f.dtype)
        return f, centres, cosine


def centroid_labels(features: Tensor, probs: Tensor, rounds: int = 2, threshold: int = 0) -> Tensor:
    """Class of the nearest of the :func:`centroids` by cosine, for a whole domain: ``[N]``."""
    return centroids(features, probs, rounds, threshold)[2].argmax(1)


class SHOT(uda.Plugin):
    """Keep the source's classifier, and move the target's features to it.

    ``label_weight * CE(z_t, y^) + entropy_weight * (mean H(p_t) - diversity * H(mean p_t))`` on the target alone, with
    ``y^`` of :func:`centroid_labels`, made anew from the whole target at the start of each epoch. The classifier is
    frozen, bottleneck and backbone train. Start from the source's model: ``model.init_from``, with the same
    ``bottleneck`` and ``head`` (published: BatchNorm and ``weight_norm``, label smoothing 0.1 on the source).

    Args:
        label_weight: published: 0.3 (0.1 for digits); entropy_weight: 1.
        diversity: False leaves the entropy of the mean out, as the published recipe does where the target lacks
            classes.
        threshold: predicted samples that a class needs to take part; 0, or 10 where the target lacks classes.
        rounds: of the centroids.
    """

    settings = ("closed", "partial", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"label_weight": (0.03, 1.0, "log"), "diversity": [True, False]}
    labels: Tensor

    def __init__(
        self,
        label_weight: float = 0.3,
        entropy_weight: float = 1.0,
        diversity: bool = True,
        threshold: int = 0,
        rounds: int = 2,
    ) -> None:
        super().__init__()
        if min(label_weight, entropy_weight) < 0 or threshold < 0 or rounds < 1:
            raise uda.UDAError("SHOT: weights and threshold must not be negative, and rounds must be 1 or more.")
        self.label_weight, self.entropy_weight, self.diversity = label_weight, entropy_weight, diversity
        self.threshold, self.rounds = threshold, rounds

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone, whole at the start of each epoch."""
        return uda.DataNeeds(source=False, refresh={"target"} if self.label_weight else ())

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Freeze the classifier; room for a label of each target sample."""
        model.head.requires_grad_(False)
        if "labels" not in self._buffers:
            size = max(model.sizes.get(model.target_name, 0), 1)
            self.register_buffer("labels", torch.zeros(size, dtype=torch.long))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Labels by the centroids of the target."""
        pool = bank.target
        found = centroid_labels(pool.features, full(pool.logits).softmax(1), self.rounds, self.threshold)
        self.log_later(changed=(found != self.labels).float().mean())
        self.labels.copy_(found)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels | None:
        """The batch's labels."""
        return uda.PseudoLabels(self.labels[step.target.index]) if self.label_weight else None

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Labels and information."""
        out, logits = {}, step.target.logits
        if self.label_weight:
            # those of another plugin, if it labelled first
            out["labels"] = self.label_weight * pseudo_cross_entropy(logits, step.target.pseudo)
        if self.entropy_weight:
            value = mean_entropy(logits)
            if self.diversity:
                log_mean = log_mean_probs(logits, over_ranks=True)
                value = value + (log_mean.exp() * log_mean).sum()
            out["information"] = self.entropy_weight * value
        return out
