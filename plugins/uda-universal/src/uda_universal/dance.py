"""Domain adaptative neighbourhood clustering via entropy optimisation (DANCE: Saito et al., NeurIPS 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import Bank, full, no_autocast
from uda.rejection import normalised_entropy


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax ``[B]`` of logits ``[B, K]``; entries of -inf take no part."""
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(1)


def neighbourhood_entropy(
    features: Tensor, prototypes: Tensor, memory: Tensor, index: Tensor, filled: Tensor, temperature: float = 0.05
) -> Tensor:
    """Mean entropy of a target sample's similarity to classes, to the other target samples and to its batch.

    Each sample is drawn to one neighbour: a class, or another target sample (equations 3 and 4). Similarities are
    cosines over T; a sample is no neighbour of itself.

    Args:
        features: of the batch ``[B, F]``; prototypes: of the classes ``[C, F]``; memory: last features of the whole
            target ``[N, F]``, constants; index: rows of the batch in it ``[B]``; filled: rows that were seen ``[N]``.
    """
    with no_autocast(features):
        f, w, m = (F.normalize(full(v), dim=1) for v in (features, prototypes, memory))
        to_memory = (f @ m.T / temperature).masked_fill(~filled, -torch.inf)
        to_memory = to_memory.scatter(1, index.expand(len(f), -1), -torch.inf)  # the batch is compared as it is now
        to_batch = (f @ f.T / temperature).masked_fill(torch.eye(len(f), dtype=torch.bool, device=f.device), -torch.inf)
        return entropy(torch.cat([f @ w.T / temperature, to_memory, to_batch], 1)).mean()


def entropy_separation(logits: Tensor, margin: float = 0.5) -> Tensor:
    """``-mean max(|H(p) - rho|, margin)`` with ``rho = log(C) / 2``: entropies leave the threshold, to either side.

    Within the margin there is no gradient: such samples are left alone (equation 6).

    Args:
        logits: ``[B, C]``.
    """
    with no_autocast(logits):
        rho = math.log(max(logits.shape[1], 2)) / 2
        return -(entropy(full(logits)) - rho).abs().clamp_min(margin).mean()


class DANCE(uda.Plugin):
    """Clusters the target's neighbourhoods, and parts known from unknown by entropy.

    ``weight * (L_nc + L_es)`` of :func:`neighbourhood_entropy` and :func:`entropy_separation`. A sample is unknown
    where the entropy of its softmax is above ``rho = log(C) / 2``. Published with a cosine classifier of temperature
    0.05 (``model.head: cosine``), separate forwards and class-balanced source batches.

    Args:
        weight: eta, 0.05 in all published runs.
        margin: m, 0.5 in all published runs, of six classes and more. None: a third of ``rho``, which decides more
            samples where there are few classes, unknown ones too.
        temperature: of the similarities.
        class_balanced: ask for class-balanced source batches.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.01, 0.5, "log")}

    def __init__(
        self,
        weight: float = 0.05,
        margin: float | None = 0.5,
        temperature: float = 0.05,
        class_balanced: bool = True,
    ) -> None:
        super().__init__()
        if weight < 0 or temperature <= 0 or (margin is not None and margin < 0):
            raise uda.UDAError("DANCE: weight and margin must not be negative, and temperature must be positive.")
        self.weight, self.margin, self.temperature, self.class_balanced = weight, margin, temperature, class_balanced
        self.memory: Bank | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains."""
        return uda.DataNeeds(class_balanced=self.class_balanced)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the features of the whole target."""
        from uda.nn.heads import class_vectors

        class_vectors(model.head, "DANCE")
        if self.memory is None:
            self.memory = Bank(max(model.sizes.get(model.target_name, 0), 1), features=(model.feature_dim,))

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Both objectives on the target."""
        batch, classes = step.target, step.model.num_classes
        margin = math.log(max(classes, 2)) / 6 if self.margin is None else self.margin
        near = neighbourhood_entropy(
            batch.features, step.model.head.weight_vectors, self.memory.features, batch.index, self.memory.filled,
            self.temperature,
        )  # fmt: skip
        return {
            "neighbourhood": self.weight * near,
            "separation": self.weight * entropy_separation(batch.logits, margin),
        }

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Keep the features of the batch."""
        self.memory.write(step.target.index, features=F.normalize(full(step.target.features), dim=1))

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: Any) -> uda.Prediction:
        """The class of the classifier; unknown by its entropy."""
        score, label = full(batch.logits).softmax(1).max(1)
        found = normalised_entropy(batch.logits)
        return uda.Prediction(label, score, unknown=found > 0.5, unknown_score=found)
