"""What GLC, GLC++ and LEAD share: a frozen classifier, number of target classes, consensus of neighbours, rejection."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.losses import class_distributions, soft_cross_entropy
from uda.nn import full
from uda.pseudo import pseudo_cross_entropy
from uda.rejection import normalised_entropy
from uda_sourcefree.neighbours import NeighbourMemory


def class_count(
    features: Tensor, classes: int, shares: tuple[float, ...], tsne: bool = False, cap: int = 2000, seed: int = 0
) -> int:
    """Number of clusters of the target, among ``classes * share``: that of k-means with the best silhouette.

    Args:
        features: ``[N, F]`` of length 1; classes: C of the source; shares: candidates, as shares of C.
        tsne: cluster a t-SNE map in two dimensions, as published, instead of the features.
        cap: samples that are looked at, drawn by ``seed``.
    """
    from sklearn.cluster import KMeans
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    x = features.detach().double().cpu()
    if len(x) > cap:
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:cap]]
    rows = x.numpy()
    if tsne:
        rows = TSNE(2, init="pca", random_state=seed, perplexity=min(30.0, max(1.0, (len(rows) - 1) / 4)))
        rows = rows.fit_transform(x.numpy())
    counts = sorted({int(classes * s) for s in shares if 2 <= int(classes * s) < len(rows)})
    if not counts:
        return max(classes, 2)
    score = {}
    for k in counts:
        found = KMeans(k, n_init=1, random_state=seed).fit_predict(rows)
        score[k] = silhouette_score(rows, found) if len(set(found.tolist())) > 1 else -1.0
    return max(score, key=score.__getitem__)


class UniversalNeighbours(NeighbourMemory, ABC):
    """Base: ``label_weight * CE(labels) + neighbour_weight * CE(mean of the neighbours' p)`` with a frozen classifier.

    Labels are distributions ``[N, C]`` with a weight each, made anew at the start of each epoch; that of an unknown
    sample is uniform. A sample is unknown where the entropy of its softmax over ``log C`` is above ``threshold``.

    Args:
        label_weight, neighbour_weight: of the two objectives; neighbours: K.
        target_classes: number of clusters of the target; None: by :func:`class_count`.
        shares, tsne: of :func:`class_count`; threshold: of the rejection.
    """

    settings = ("closed", "partial", "open", "universal", "source-free")
    soft: Tensor
    weight: Tensor
    clusters: Tensor

    def __init__(
        self,
        label_weight: float,
        neighbour_weight: float,
        neighbours: int,
        target_classes: int | None,
        shares: tuple[float, ...],
        tsne: bool,
        threshold: float,
    ) -> None:
        super().__init__(neighbours)
        who = type(self).__name__
        if min(label_weight, neighbour_weight) < 0 or not 0 <= threshold <= 1:
            raise uda.UDAError(f"{who}: weights must not be negative, and threshold is in [0, 1].")
        if (target_classes is not None and target_classes < 2) or not shares or min(shares) <= 0:
            raise uda.UDAError(f"{who}: target_classes must be 2 or more, and shares positive.")
        self.label_weight, self.neighbour_weight = label_weight, neighbour_weight
        self.target_classes, self.shares, self.tsne, self.threshold = target_classes, tuple(shares), tsne, threshold

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Freeze the classifier; memory, and room for labels."""
        super().build(model)
        model.head.requires_grad_(False)
        if "soft" not in self._buffers:
            size = max(model.sizes.get(model.target_name, 0), 1)
            self.register_buffer("soft", torch.full((size, model.num_classes), 1.0 / model.num_classes))
            self.register_buffer("weight", torch.ones(size))
            self.register_buffer("clusters", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def labelled(self, model: uda.UDA, features: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class ids ``[N]``, mask of the unknown ``[N]``, weights ``[N]`` of the whole target."""

    def due(self, model: uda.UDA) -> bool:
        """Whether to count the clusters of the target (again)."""
        return int(self.clusters) == 0

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Fill the memory; count clusters where due; label the target."""
        pool = bank.target
        everyone = torch.arange(len(pool), device=pool.features.device)
        mine = everyone if model.trainer.global_rank == 0 else everyone[:0]
        self._write(mine, pool.features[mine], pool.logits[mine])
        features, probs = F.normalize(full(pool.features), dim=1), full(pool.logits).softmax(1)
        if self.due(model):
            known = self.target_classes
            if known is None:
                first = model.trainer.global_rank == 0
                known = class_count(features, model.num_classes, self.shares, self.tsne) if first else 0
                known = model.trainer.strategy.broadcast(known)
            self.clusters.fill_(known)
        label, unknown, weight = self.labelled(model, features, probs)
        soft = class_distributions(label, probs.shape[1])
        self.soft.copy_(torch.where(unknown[:, None], 1.0 / probs.shape[1], soft))
        self.weight.copy_(weight)
        self.log_later(unknown=unknown.float().mean(), clusters=self.clusters.float())

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """The batch's labels."""
        soft = self.soft[step.target.index]
        return uda.PseudoLabels(soft.argmax(1), weight=self.weight[step.target.index], soft=soft)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The objectives."""
        return self.objectives(step, self.around(step)[1])

    def objectives(self, step: uda.Step, near: Tensor) -> dict[str, Tensor]:
        """Labels, and consensus with the neighbours, rows ``near`` ``[B, K]`` of the memory."""
        logits = step.target.logits
        return {
            "labels": self.label_weight * pseudo_cross_entropy(logits, step.target.pseudo),
            "neighbours": self.neighbour_weight * soft_cross_entropy(logits, self.memory.probs[near].mean(1)),
        }

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: Any, prediction: uda.Prediction) -> uda.Prediction | None:
        """Unknown by the entropy; sources are never rejected."""
        if batch.role == "source":
            return None
        found = normalised_entropy(batch.logits)
        return prediction.rejecting(found > self.threshold, found)
