"""Selective Adversarial Networks (Cao et al., CVPR 2018)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.losses import mean_entropy
from uda.nn import full, no_autocast, reverse_gradient, warm_start
from uda_partial.weights import ClassEstimate


class ClasswiseDiscriminators(nn.Module):
    """One discriminator a class, Linear-ReLU-(dropout) ``layers`` times and Linear, all in one product a layer.

    Args:
        classes: K; in_features: F; hidden: width; layers: hidden layers; dropout: after each.
    """

    def __init__(self, classes: int, in_features: int, hidden: int, layers: int, dropout: float) -> None:
        super().__init__()
        widths = [in_features, *[hidden] * layers, 1]
        self.dropout = dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for a, b in pairwise(widths):  # as nn.Linear starts
            bound = 1 / math.sqrt(a)
            self.weights.append(nn.Parameter(torch.empty(classes, a, b).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(classes, 1, b).uniform_(-bound, bound)))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, F] -> [B, K]``, logits."""
        x = x.expand(len(self.weights[0]), *x.shape)  # [K, B, F]
        for i, (w, b) in enumerate(zip(self.weights, self.biases, strict=True)):
            if i:
                x = F.dropout(F.relu(x), self.dropout, self.training)
            x = torch.baddbmm(b.to(x.dtype), x, w.to(x.dtype))
        return x.squeeze(2).T


def selective_loss(logits: Tensor, domain: float, probs: Tensor, class_weight: Tensor) -> Tensor:
    """``1/B sum_i sum_k w_k p_ik BCE(D_k(f_i), domain)``.

    Args:
        logits: of the K discriminators ``[B, K]``; domain: their label, 1 for the source.
        probs: class probabilities ``[B, K]``, constants; class_weight: ``[K]``.
    """
    with no_autocast(logits):
        loss = F.binary_cross_entropy_with_logits(full(logits), torch.full_like(full(logits), domain), reduction="none")
        return (loss * full(probs).detach() * class_weight).sum(1).mean()


class SAN(ClassEstimate):
    """A discriminator for each source class; a sample plays against those of the classes that it may belong to.

    ``weight * 1/2 [E_s + E_t]`` with ``E = mean_i sum_k w_k p_ik BCE(D_k(f_i), domain)``, ``p`` the class
    probabilities and ``w_k`` their mean over the target, behind gradient reversal (Cao et al. 2018): the sample weight
    chooses the discriminators, the class weight turns those of absent classes off. The target's entropy is minimised as
    well, at a weight that grows as the reversal does.

    Numbers are those of the authors' first release (Caffe, Office-31). Their later one (PyTorch) is another objective:
    ``D_k`` sees ``p_ik f_i``, all samples count alike, and class weights scale the reversal alone.

    Args:
        weight: of the adversarial objective. entropy_weight: of the target's entropy, finally (the paper's equation has
            1, which on small data ends in few classes).
        temperature, normalise, warmup, every: as in :class:`~uda_partial.weights.ClassWeights`. ``mean`` is the paper's
            weight times the number of classes, as the authors have it, which keeps the size of the objective.
        gamma, reversal: as in :class:`~uda_adversarial.adversary.Adversary`.
        hidden, layers, dropout: each discriminator (the authors: two layers of 1024 for Office-31, one of 256 for
            Caltech-256, none for ImageNet).
        lr_scale: learning rate of the discriminators relative to the head's.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.03, 1.0, "log"), "entropy_weight": (0.01, 1.0, "log"), "hidden": [64, 256, 1024],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 0.1,
        entropy_weight: float = 0.05,
        temperature: float = 1.0,
        normalise: str = "mean",
        warmup: float = 0.1,
        every: int = 0,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(weight, entropy_weight, reversal) < 0 or hidden < 1 or layers < 0 or not 0 <= dropout < 1:
            raise uda.UDAError(
                "SAN: weights and reversal must not be negative, hidden must be positive, and dropout lies in [0, 1)."
            )
        self.set_estimate(temperature, normalise, warmup, every)
        self.weight, self.entropy_weight, self.gamma, self.reversal = weight, entropy_weight, gamma, reversal
        self.lr_scale, self._net = lr_scale, (hidden, layers, dropout)
        self.discriminators: ClasswiseDiscriminators | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The discriminators, and weights for the model's classes."""
        self.make_estimate(model.num_classes)
        if self.discriminators is None:
            self.discriminators = ClasswiseDiscriminators(model.num_classes, model.feature_dim, *self._net)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The discriminators at their own rate."""
        return [{"name": self.key, "params": self.discriminators.parameters(), "lr_scale": self.lr_scale}]

    def grown(self, step: uda.Step) -> float:
        """How far reversal and entropy have grown, in [0, 1]."""
        return warm_start(step.progress, self.gamma)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """All discriminators on both domains."""
        coefficient = self.reversal * self.grown(step)
        losses = []
        for domain, features, logits in (
            (1.0, step.pooled("features"), step.pooled("logits")),
            (0.0, step.target.features, step.target.logits),
        ):
            found = self.discriminators(reverse_gradient(features, coefficient))
            losses.append(selective_loss(found, domain, full(logits).softmax(1), self.class_weight))
        self.log_later(reversal=coefficient)
        self.log_classes()
        return {"domains": self.weight * (losses[0] + losses[1]) / 2}

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Entropy of the target."""
        if not self.entropy_weight:
            return {}
        return {"entropy": self.entropy_weight * self.grown(step) * mean_entropy(step.target.logits)}
