"""One-versus-all network for universal adaptation (OVANet: Saito and Saenko, ICCV 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.losses import class_distributions
from uda.nn import full, no_autocast


def one_vs_all_losses(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``mean -log q(y)`` and ``mean max_{k != y} -log(1 - q(k))``: the own class, and the hardest other one.

    ``q(k)`` is the softmax over the pair (not k, k); only the hardest negative counts (equation 1).

    Args:
        logits: ``[B, 2, C]``, channel 1 for "is class k"; y: class ids ``[B]`` or distributions ``[B, C]``, whose
            largest entry counts.
    """
    with no_autocast(logits):
        log_no, log_yes = full(logits).log_softmax(1).unbind(1)
        own = class_distributions(y if y.ndim == 1 else y.argmax(1), logits.shape[2], torch.bool)
        positive = -log_yes[own].mean()
        negative = (-log_no).masked_fill(own, -torch.inf).amax(1).mean() if logits.shape[2] > 1 else 0 * positive
        return positive, negative


def pair_entropy(logits: Tensor) -> Tensor:
    """Mean over samples and classes of the entropy of the pair (not k, k) (equation 2), ``[B, 2, C]`` to a scalar."""
    with no_autocast(logits):
        log_q = full(logits).log_softmax(1)
        return -(log_q.exp() * log_q).sum(1).mean()


class OneVsAllHead(nn.Module):
    """``[B, F] -> [B, 2, C]``, a linear classifier without bias whose weight vectors have length 1."""

    def __init__(self, in_features: int, num_classes: int, unit: bool) -> None:
        super().__init__()
        self.weight, self.unit = nn.Parameter(nn.Linear(in_features, 2 * num_classes).weight.detach().clone()), unit

    def forward(self, features: Tensor) -> Tensor:
        """Logits of the pairs (not k, k)."""
        weight = F.normalize(self.weight, dim=1) if self.unit else self.weight
        return F.linear(features, weight).unflatten(1, (2, -1))


class OVANet(uda.Plugin):
    """A binary classifier a class learns from the source where the class ends; the closed-set one names the class.

    ``weight * (L_pos + L_neg)`` on the source (:func:`one_vs_all_losses`) and ``entropy_weight`` times
    :func:`pair_entropy` on the target. A sample is unknown where the binary classifier of the class that the model's
    classifier names says no with more than 0.5. The source batches are class-balanced, as the authors' are.

    Args:
        weight: the authors' code has 0.5; entropy_weight: 0.1.
        threshold: of the probability of "no".
        unit: weight vectors of length 1, as in the authors' code.
        class_balanced: ask for class-balanced source batches.
        lr_scale: learning rate of the binary classifiers relative to the head's.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 2.0, "log"), "entropy_weight": (0.01, 0.5, "log")}

    def __init__(
        self,
        weight: float = 0.5,
        entropy_weight: float = 0.1,
        threshold: float = 0.5,
        unit: bool = True,
        class_balanced: bool = True,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(weight, entropy_weight) < 0 or not 0 < threshold < 1:
            name = type(self).__name__
            raise uda.UDAError(f"{name}: weights must not be negative, and threshold lies between 0 and 1.")
        self.weight, self.entropy_weight, self.threshold = weight, entropy_weight, threshold
        self.unit, self.class_balanced, self.lr_scale = unit, class_balanced, lr_scale
        self.pairs: OneVsAllHead | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains."""
        return uda.DataNeeds(class_balanced=self.class_balanced)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The binary classifiers."""
        if self.pairs is None:
            self.pairs = OneVsAllHead(model.feature_dim, model.num_classes, self.unit)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The binary classifiers at their own rate."""
        return [{"name": self.key, "params": self.pairs.parameters(), "lr_scale": self.lr_scale}]

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Where classes end on the source, and certainty about it on the target."""
        positive, negative = one_vs_all_losses(self.pairs(step.pooled("features")), step.pooled("y"))
        self.log_later(positive=positive, negative=negative)
        out = {"one_vs_all": self.weight * (positive + negative)}
        if self.entropy_weight:
            out["entropy"] = self.entropy_weight * pair_entropy(self.pairs(step.target.features))
        return out

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: Any) -> uda.Prediction:
        """The closed-set class, and what its binary classifier says."""
        with no_autocast(batch.logits):
            score, label = full(batch.logits).softmax(1).max(1)
            no = full(self.pairs(full(batch.features))).softmax(1)[:, 0].gather(1, label[:, None])[:, 0]
        return uda.Prediction(label, score, unknown=no > self.threshold, unknown_score=no)
