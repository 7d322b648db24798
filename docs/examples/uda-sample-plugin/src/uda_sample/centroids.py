"""Self-training on the nearest class centroid of the target's own features.

The labelling step is that of SHOT (Liang, Hu & Feng, ICML 2020, equations 5 and 6).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import gather_rows
from uda.passes import Pools


def soft_centroids(features: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean direction of each class, every sample counted by its probability.

    ``mu_c = sum_i p_ic f_i / |f_i|  /  sum_i p_ic``

    Args:
        features: ``[N, F]``.
        probs: class probabilities ``[N, C]``.

    Returns:
        Centroids ``[C, F]`` and the mass ``sum_i p_ic`` of each class ``[C]``, float32.
    """
    features, probs = F.normalize(features.float(), dim=1), probs.float()
    mass = probs.sum(0)
    return probs.T @ features / mass.clamp_min(1e-8)[:, None], mass


def similarities(features: Tensor, centroids: Tensor) -> Tensor:
    """Cosine of each sample with each centroid: ``[B, F]``, ``[C, F]`` -> ``[B, C]``, float32."""
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=1) @ F.normalize(centroids, dim=1).T


class CentroidLabels(uda.Plugin):
    """Train on the labels of the nearest class centroid of the target.

    Once an epoch all target samples give centroids ``mu_c = sum_i p_ic f_i / sum_i p_ic`` with ``p`` the
    softmax and ``f`` the features of length one; each step moves them by its own samples,
    ``mu <- momentum * mu + (1 - momentum) * mu_batch``. A sample is labelled
    ``y_i = argmax_c cos(f_i, mu_c)`` with the weight ``w_i = max_c softmax_c(cos(f_i, mu_c) / temperature)``,
    and

    ``L = L_cls + weight * min(1, p / warmup) * 1/B sum_i w_i CE(z_i, y_i)``

    where ``p`` is the share of the training that is done.

    Args:
        weight: of the objective.
        momentum: share of a centroid that stays in a step, in [0, 1].
        temperature: of the similarities.
        warmup: share of the training in which the objective rises; 0 for none.
        predict_nearest: predict by the nearest centroid instead of the classifier.
    """

    hook_api = 1
    settings = ("closed", "multi-source")
    search_space: ClassVar = {"weight": (0.03, 1.0, "log"), "temperature": (0.03, 0.3, "log")}

    centroids: Tensor
    known: Tensor

    def __init__(
        self,
        weight: float = 0.3,
        momentum: float = 0.9,
        temperature: float = 0.1,
        warmup: float = 0.1,
        predict_nearest: bool = False,
    ) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0 or not 0 <= momentum <= 1 or not 0 <= warmup < 1:
            raise uda.UDAError(
                "CentroidLabels: weight must not be negative, temperature must be positive, momentum must be "
                f"in [0, 1] and warmup in [0, 1); got {weight=}, {temperature=}, {momentum=}, {warmup=}."
            )
        self.weight, self.momentum, self.temperature = weight, momentum, temperature
        self.warmup, self.predict_nearest = warmup, predict_nearest

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source and target batches, and the whole target at the start of each epoch."""
        return uda.DataNeeds(refresh={"target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Make the centroids at their final size, once."""
        if "centroids" not in self._buffers:
            self.register_buffer("centroids", torch.zeros(model.num_classes, model.feature_dim))
            self.register_buffer("known", torch.zeros(model.num_classes, dtype=torch.bool))

    @uda.hookimpl
    def refresh(self, bank: Pools) -> None:
        """Centroids of the whole target."""
        centroids, mass = soft_centroids(bank.target.features, bank.target.logits.softmax(1))
        self.centroids.copy_(centroids)
        self.known.copy_(mass > 1e-3)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels | None:
        """Label the target batch by the nearest centroid."""
        label, confidence = self.nearest(step.target.features.detach())
        return uda.PseudoLabels(label, weight=confidence)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Cross-entropy of the target on its pseudo-labels, whoever gave them."""
        pseudo = step.target.pseudo
        loss = uda.losses.classification_loss(step.target.logits, pseudo.y, weight=pseudo.weight)
        ramp = min(1.0, step.progress / self.warmup) if self.warmup else 1.0
        self.log_later(confidence=pseudo.weight.mean() if pseudo.weight is not None else 1.0)
        return {"self_training": self.weight * ramp * loss}

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Move the centroids by the samples of all processes."""
        features = gather_rows(step.target.features.float())
        probs = gather_rows(step.target.logits.float().softmax(1))
        batch, mass = soft_centroids(features, probs)
        moved = self.momentum * self.centroids + (1 - self.momentum) * batch
        self.centroids.copy_(torch.where((self.known & (mass > 1e-3))[:, None], moved, self.centroids))

    @uda.hookimpl
    def predict(self, batch: uda.DomainBatch) -> uda.Prediction | None:
        """The nearest centroid, if that is wanted and there are centroids yet."""
        if not (self.predict_nearest and self.known.any()):
            return None
        label, confidence = self.nearest(batch.features)
        return uda.Prediction(label, confidence)

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class of the nearest known centroid ``[B]`` and its probability ``[B]``."""
        similarity = similarities(features, self.centroids).masked_fill(~self.known, -torch.inf)
        confidence, label = (similarity / self.temperature).softmax(1).max(1)
        return label, confidence
