"""Contrastive Adaptation Network for Unsupervised Domain Adaptation (Kang et al., CVPR 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.kernels import contrastive_discrepancy
from uda.nn import full
from uda.passes import Pools
from uda_discrepancy.base import KernelDiscrepancy
from uda_discrepancy.clustering import class_centres, spherical_kmeans
from uda_discrepancy.domain_norm import separate_batchnorm

LAYERS = ("features", "probs", "both")


class CAN(KernelDiscrepancy):
    """Draw the same classes of the domains together and different ones apart (Kang et al. 2019, equations 6 and 7).

    ``L = L_cls + weight * sum_layers CDD``. At the start of each epoch the whole target is clustered by spherical
    k-means from the source's class centres; the cluster is the pseudo-label. Samples far from their centre, and
    classes with few such samples, take no part.

    Source batches are class-balanced. Target batches are drawn uniformly, not class by class as published: classes
    that a batch lacks in one domain are left out of its objective, so take a batch of several samples a class. The
    published stopping criterion (assignments that no longer change) is ``train/<key>/moved``; the run has its length.

    Args:
        weight: of the objective (0.3).
        layers: ``both`` (features and probabilities), ``features`` or ``probs``.
        max_distance: farthest sample, in ``(1 - cos) / 2``, that keeps its pseudo-label (1: all).
        min_samples: fewest such samples of a class that takes part.
        tolerance, iterations: when k-means stops.
        warmup: share of the run before the objective sets in. Published runs start at once, from a pretrained network
            whose clusters are classes already; behind layers that start at random the first clusters mean little,
            and confirm themselves.
        domain_batchnorm: a BatchNorm for each domain in backbone and bottleneck; needs ``model.forward_mode:
            separate``.
        others: as in :class:`~uda_discrepancy.base.KernelDiscrepancy`.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.03, 1.0, "log"), "layers": list(LAYERS), "max_distance": (0.05, 1.0, "log"),
    }  # fmt: skip
    labels: Tensor
    shares: Tensor

    def __init__(
        self,
        weight: float = 0.3,
        layers: str = "both",
        max_distance: float = 1.0,
        min_samples: int = 3,
        tolerance: float = 0.005,
        iterations: int = 100,
        warmup: float = 0.0,
        domain_batchnorm: bool = True,
        kernels: int = 5,
        factor: float = 2.0,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, kernels, factor, ramp)
        check_choice("CAN", "layers", layers, LAYERS)
        if not 0 < max_distance <= 1 or not 0 <= warmup < 1 or min_samples < 1 or iterations < 1:
            raise uda.UDAError(
                "CAN: max_distance must be in (0, 1], warmup in [0, 1), min_samples and iterations 1 or more."
            )
        self.layers, self.max_distance, self.min_samples = layers, max_distance, min_samples
        self.tolerance, self.iterations, self.warmup = tolerance, iterations, warmup
        self.domain_batchnorm = domain_batchnorm

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Class-balanced source batches, and both domains at the start of each epoch."""
        return uda.DataNeeds(class_balanced=True, refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Domain-wise BatchNorm, and a pseudo-label for each target sample (-1: none)."""
        if self.domain_batchnorm:
            separate_batchnorm(model, "CAN", required=False)
        if "labels" not in self._buffers:
            size = model.sizes.get(model.target_name, 0)
            self.register_buffer("labels", torch.full((size,), -1))
            self.register_buffer("shares", torch.zeros(2))  # of labelled samples, and of labels that changed

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Cluster the target."""
        source = [torch.cat([getattr(p, name) for p in bank.sources.values()]) for name in ("features", "y")]
        centres, _ = class_centres(*source, model.num_classes)
        label, distance, _ = spherical_kmeans(bank.target.features, centres, self.tolerance, self.iterations)
        label = torch.where(distance < self.max_distance, label, -1)
        count = F.one_hot(label.clamp_min(0), model.num_classes)[label >= 0].sum(0)
        label = torch.where((label >= 0) & (count[label.clamp_min(0)] >= self.min_samples), label, -1)
        self.shares.copy_(torch.stack([(label >= 0).float().mean(), (label != self.labels).float().mean()]))
        self.labels.copy_(label)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The contrastive discrepancy, summed over layers."""
        y, pseudo = step.pooled("y"), self.labels[step.target.index]
        y = y if y.ndim == 1 else y.argmax(1)
        pairs = {
            "features": lambda: (step.pooled("features"), step.target.features),
            "probs": lambda: (full(step.pooled("logits")).softmax(1), full(step.target.logits).softmax(1)),
        }
        names = ("features", "probs") if self.layers == "both" else (self.layers,)
        if step.progress < self.warmup:
            pseudo = torch.full_like(pseudo, -1)  # the objective is zero, with a graph: all layers take part
        self.log_later(kept=self.shares[0].clone, moved=self.shares[1].clone)
        found = {}
        for name in names:
            source, target = pairs[name]()
            value = contrastive_discrepancy(
                source, y, target, pseudo, step.model.num_classes, self.kernels, self.factor
            )
            found[f"cdd_{name}"] = self.scaled(step, value)
        return found
