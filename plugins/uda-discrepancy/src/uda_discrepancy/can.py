"""Contrastive Adaptation Network for Unsupervised Domain Adaptation (Kang et al., CVPR 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.kernels import gaussian_kernel, squared_distances
from uda.nn import full, no_autocast
from uda.passes import Pools
from uda_discrepancy.base import KernelDiscrepancy
from uda_discrepancy.clustering import class_centres, spherical_kmeans
from uda_discrepancy.domain_norm import separate_batchnorm

LAYERS = ("features", "probs", "both")


def contrastive_discrepancy(
    source: Tensor, y: Tensor, target: Tensor, pseudo: Tensor, classes: int, kernels: int = 5, factor: float = 2.0
) -> Tensor:
    """Class-aware MMD within classes minus that between classes (Kang et al. 2019, equations 3 to 5).

    ``CDD = mean_c D(c, c) - mean_{c != c'} D(c, c')`` with D(c, c') the (biased) squared MMD between the source
    samples of class c and the target samples of class c', over the classes that both domains have in the batch. Each
    pair of classes has kernels of its own width: the mean squared distance of the samples of the pair, a constant.

    Args:
        source: ``[n, F]`` with classes ``y`` ``[n]``; target: ``[m, F]`` with pseudo-labels ``pseudo`` ``[m]``. A
            negative label leaves a sample out.
        classes: C.
        kernels, factor: number of kernels and ratio of their variances.

    Returns:
        Scalar; 0 (with a graph) where the domains have no class in common.
    """
    with no_autocast(source):
        source, target = full(source), full(target)
        both = [F.one_hot(labels.clamp_min(0), classes) * (labels >= 0)[:, None] for labels in (y, pseudo)]
        a, b = (x.to(source.dtype) for x in both)  # memberships [n, C], [m, C]
        active = (a.sum(0) > 0) & (b.sum(0) > 0)
        a, b = a * active, b * active
        ss, tt, st = squared_distances(source), squared_distances(target), squared_distances(source, target)
        with torch.no_grad():  # width of the pair (c, c'), [C, C]
            inner_s, inner_t = ((m.T @ d @ m).diagonal() for m, d in ((a, ss), (b, tt)))
            number = a.sum(0)[:, None] + b.sum(0)[None, :]
            total = inner_s[:, None] + inner_t[None, :] + 2 * a.T @ st @ b
            width = (total / (number * number - number).clamp_min(1)).clamp_min(1e-12)
            row, column = a.argmax(1), b.argmax(1)
        share_s, share_t = a / a.sum(0).clamp_min(1), b / b.sum(0).clamp_min(1)

        def within(distances: Tensor, members: Tensor, share: Tensor, widths: Tensor) -> Tensor:
            """Mean kernel among the samples of class c, at the width of each pair: ``[C, C]``."""
            kernel = gaussian_kernel(distances[:, :, None], widths[:, None, :], kernels, factor)
            kernel = kernel * (members @ members.T)[:, :, None]
            return torch.einsum("ic,ijk,jc->ck", share, kernel, share)

        cross = share_s.T @ gaussian_kernel(st, width[row][:, column], kernels, factor) @ share_t
        e1 = within(ss, a, share_s, width[row])
        e2 = within(tt, b, share_t, width.T[column]).T
        mmd = (e1 + e2 - 2 * cross) * (active[:, None] & active[None, :])
        count = active.sum()
        intra = mmd.diagonal().sum() / count.clamp_min(1)
        inter = (mmd.sum() - mmd.diagonal().sum()) / (count * (count - 1)).clamp_min(1)
        return intra - inter


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
