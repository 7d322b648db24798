"""GLC with contrastive affinity (GLC++: Qu et al., arXiv 2403.14410)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.nn import full, gather_rows, no_autocast
from uda_sourcefree.glc import GLC


def contrastive_affinity(anchors: Tensor, near: Tensor, others: Tensor, same: Tensor, clusters: int) -> Tensor:
    """Towards the nearest of the target, away from hard negatives of the batch: a scalar.

    ``mean_i [sum_k f_i . g_ik - sum_k f_i . m_ik]``. The K hard negatives ``g_ik`` are those of the batch that follow
    on the ``ceil(M / clusters)`` most similar to i, which may be of its class; fewer where the batch ends before. There
    is no temperature, and a gradient for the anchors alone.

    Args:
        anchors: ``f`` of length 1 ``[B, F]``; near: ``m``, those of their neighbours ``[B, K, F]``.
        others: features of the batch of all processes ``[M, F]``; same: mask ``[B, M]`` of an anchor's own row there.
        clusters: number of target classes.
    """
    with no_autocast(anchors):
        f, k, m = full(anchors), near.shape[1], len(others)
        first = -(-m // clusters)
        similar = (f @ full(others.detach()).T).masked_fill(same, -torch.inf)
        hard = similar.topk(min(first + k, m), dim=1).values[:, first:]
        hard = torch.where(hard.isfinite(), hard, 0.0).sum(1)
        return (hard - torch.einsum("bf,bkf->b", f, full(near.detach()))).mean()


class GLCPlusPlus(GLC):
    """GLC, and features that go towards their neighbours and away from hard negatives, unknown samples too.

    ``affinity_weight`` times :func:`contrastive_affinity` beside the objectives of GLC: its labels are uniform for all
    unknown samples and leave private classes mixed; this one needs no labels. Neighbours are those of the memory, with
    their features of this step where they are in its batch. Source model, rejection and the rest are GLC's.

    Args:
        label_weight, neighbour_weight, neighbours, prior, target_classes, shares, tsne, threshold: of GLC.
        affinity_weight: published: 1, and 0 on DomainNet.
    """

    search_space: ClassVar[dict[str, Any]] = {**GLC.search_space, "affinity_weight": (0.1, 2.0, "log")}

    def __init__(
        self,
        label_weight: float = 0.3,
        neighbour_weight: float = 1.0,
        neighbours: int = 4,
        prior: float = 0.75,
        target_classes: int | None = None,
        shares: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0),
        tsne: bool = True,
        threshold: float = 0.55,
        affinity_weight: float = 1.0,
    ) -> None:
        super().__init__(label_weight, neighbour_weight, neighbours, prior, target_classes, shares, tsne, threshold)
        if affinity_weight < 0:
            raise uda.UDAError(f"GLCPlusPlus: affinity_weight must not be negative, not {affinity_weight}.")
        self.affinity_weight = affinity_weight

    def objectives(self, step: uda.Step, near: Tensor) -> dict[str, Tensor]:
        """As GLC, and the affinity."""
        out = super().objectives(step, near)
        if self.affinity_weight:
            own = step.target.index
            with no_autocast(step.target.features):
                anchors = self.keys(step.target.features)
            index, others = gather_rows(own), gather_rows(anchors)
            now = near[..., None] == index  # [B, K, M]: neighbours in the batch
            rows = torch.where(now.any(2)[..., None], others[now.int().argmax(2)], self.memory.features[near])
            loss = contrastive_affinity(anchors, rows, others, own[:, None] == index, int(self.clusters))
            out["affinity"] = self.affinity_weight * loss
        return out
