"""Domain Adaptation with Auxiliary Target Domain-Oriented Classifier (ATDOC: Liang et al., CVPR 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.losses import classification_loss
from uda.nn import Bank, full, gather_rows, no_autocast
from uda.nn import ramp as ramp_factor
from uda_selftraining.get import first_prototypes, next_prototypes


def sharpened(probs: Tensor, temperature: float, mass: Tensor | None = None) -> Tensor:
    """``p_ic^(1/T) / sum_j p_jc^(1/T)`` ``[B, C]``: sharper by sample, and equal shares of the classes.

    Args:
        probs: ``[B, C]``; temperature: T.
        mass: the sums over samples ``[C]``; None: over ``probs``.
    """
    power = probs ** (1 / temperature)
    return power / (power.sum(0) if mass is None else mass).clamp_min(1e-12)


def neighbour_labels(similarity: Tensor, votes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Label ``[B]`` and confidence ``[B]`` by the mean vote of the ``k`` most similar rows.

    Args:
        similarity: to each memory row ``[B, N]``; ``-inf`` excludes a row.
        votes: of the memory rows ``[N, C]``.
        k: neighbours, at most N.
    """
    value, row = similarity.topk(min(k, similarity.shape[1]), dim=1)
    chosen = votes[row] * torch.isfinite(value)[:, :, None]
    confidence, label = (chosen.sum(1) / k).max(1)
    return label, confidence


class ATDOC(uda.Plugin):
    """Label the target by an auxiliary classifier on a memory of the target, and learn the labels.

    ``nc``: the nearest of the target's class centroids, which follow the batches. ``na``: the mean of the sharpened
    predictions of the k nearest target samples (the sample itself left out), with the mean's maximum as the weight.
    The auxiliary classifier labels only; training and inference are the ordinary classifier's. The labels are
    offered to other plugins as the step's pseudo-labels.

    Args:
        mode: ``na`` (neighbourhood aggregation) or ``nc`` (nearest centroid).
        weight: of the objective at the end of its ramp (the paper: 1).
        neighbours: k of ``na``.
        rate: share of a batch in the memory; None: 1 for ``na``, whose rows are replaced, and 0.1 for ``nc``.
        temperature: T of the sharpening ``p^(1/T)`` of ``na``.
        weighted: ``na``: weigh samples by their confidence, normalised over the batch.
        absent: ``nc``: centroid of a class that no sample of the batch is predicted as: ``skip`` leaves it,
            ``shrink`` counts its mean as zero, as the authors' code does.
        ramp: growth of the weight over the run's progress: ``linear`` (the paper), ``none``, ``warm_start``.
    """

    settings = ("closed", "partial", "multi-source", "semi-supervised")
    search_space: ClassVar[dict[str, Any]] = {
        "mode": ["na", "nc"], "weight": (0.1, 3.0, "log"), "neighbours": [3, 5, 10],
    }  # fmt: skip

    def __init__(
        self,
        mode: str = "na",
        weight: float = 1.0,
        neighbours: int = 5,
        rate: float | None = None,
        temperature: float = 0.5,
        weighted: bool = True,
        absent: str = "skip",
        ramp: str = "linear",
    ) -> None:
        super().__init__()
        check_choice("ATDOC", "mode", mode, ("na", "nc"))
        check_choice("ATDOC", "absent", absent, ("skip", "shrink"))
        if weight < 0 or temperature <= 0 or neighbours < 1:
            raise uda.UDAError("ATDOC: weight must not be negative, temperature and neighbours must be positive.")
        rate = (1.0 if mode == "na" else 0.1) if rate is None else rate
        if not 0 < rate <= 1:
            raise uda.UDAError(f"ATDOC: rate is a share in (0, 1], not {rate}.")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.mode, self.weight, self.neighbours, self.rate = mode, weight, neighbours, rate
        self.temperature, self.weighted, self.absent, self.ramp = temperature, weighted, absent, ramp
        self.memory: Bank | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The memory: unit features and votes by sample, or random unit centroids (equal on all processes)."""
        classes, width = model.num_classes, model.feature_dim
        if self.mode == "nc":
            if "centroids" not in self._buffers:
                self.register_buffer("centroids", first_prototypes(classes, width, model.base_seed))
        elif self.memory is None:
            if not (size := model.sizes.get(model.target_name, 0)):
                raise uda.UDAError("ATDOC: mode 'na' keeps a row of each target sample and needs the target's size.")
            self.memory = Bank(size, features=width, votes=classes)

    @torch.no_grad()
    def labels(self, features: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Labels ``[B]`` and confidences ``[B]`` by the memory; confidence 0 where it knows no neighbour yet."""
        with no_autocast(features):
            features = F.normalize(full(features), dim=1)
            if self.mode == "nc":
                label = (features @ F.normalize(self.centroids, dim=1).T).argmax(1)
                return label, torch.ones_like(label, dtype=torch.float32)
            similarity = features @ self.memory.read("features").T
            similarity = similarity.masked_fill(~self.memory.filled, float("-inf"))
            similarity.scatter_(1, index[:, None], float("-inf"))
            return neighbour_labels(similarity, self.memory.read("votes"), self.neighbours)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """The auxiliary classifier's labels of the target batch."""
        label, confidence = self.labels(step.target.features, step.target.index)
        step.target.cache[f"{self.key}.labels"] = label, confidence
        return uda.PseudoLabels(label, weight=confidence if self.mode == "na" and self.weighted else None)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Cross-entropy of the target on the auxiliary classifier's labels."""
        found = step.target.cache.get(f"{self.key}.labels")  # not there where another plugin labelled first
        label, confidence = found or self.labels(step.target.features, step.target.index)
        weight = None
        if self.mode == "na":  # a sample without a neighbour has no label: it counts zero either way
            weight = confidence if self.weighted else (confidence > 0).to(confidence.dtype)
            weight = weight * len(weight) / weight.sum().clamp_min(1e-12)
        loss = classification_loss(step.target.logits, label, weight=weight)
        self.log_later(confidence=confidence.mean())
        return {"auxiliary": self.weight * ramp_factor(self.ramp, step.progress) * loss}

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """The memory follows the samples of all processes."""
        target = step.target
        with no_autocast(target.features):
            features, probs = full(target.features), full(target.logits).softmax(1)
            if self.mode == "nc":
                features, label = gather_rows(features), gather_rows(probs).argmax(1)
                moved = next_prototypes(self.centroids, features, label, self.rate, self.absent == "skip")
                self.centroids.copy_(moved)
                return
            mass = gather_rows((probs ** (1 / self.temperature)).sum(0, keepdim=True)).sum(0)
            votes = sharpened(probs, self.temperature, mass)
            self.memory.write(
                target.index, momentum=1 - self.rate, features=F.normalize(features, dim=1), votes=votes
            )
