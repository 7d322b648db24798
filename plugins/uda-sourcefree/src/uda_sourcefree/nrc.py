"""Neighbourhood reciprocity clustering (NRC: Yang et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.losses import log_mean_probs
from uda_sourcefree.neighbours import NeighbourMemory, nearest


def reciprocity(near: Tensor, expanded: Tensor, index: Tensor, low: float = 0.1) -> Tensor:
    """Affinity ``[B, K]``: 1 where a sample is among its neighbour's neighbours, else ``low`` (equation 2).

    Args:
        near: rows of neighbours ``[B, K]``; expanded: of each one's own neighbours ``[B, K, M]``; index: the samples'
            own rows ``[B]``.
    """
    mutual = (expanded == index[:, None, None]).any(2)
    return torch.where(mutual, 1.0, low).to(torch.float32)


def neighbour_agreement(probs: Tensor, others: Tensor, weight: Tensor | float) -> Tensor:
    """``-mean_i sum_k a_ik p_i . s_ik``; ``[B, C]``, constants ``[B, K, C]`` and ``[B, K]``."""
    inner = torch.einsum("bc,bkc->bk", probs, others)
    return -(weight * inner).sum(1).mean()


class NRC(NeighbourMemory):
    """A target sample agrees with its neighbours, most with those that have it as a neighbour too.

    ``L_N + L_E + L_div`` on the target alone: :func:`neighbour_agreement` with K neighbours weighed by
    :func:`reciprocity`, the same with the M neighbours of each at ``low``, and ``sum_c pbar_c log pbar_c`` against
    collapse (equations 3 to 6). The sample itself may be among the neighbours of its neighbours, as in the authors'
    code. Backbone, bottleneck and classifier train. Start from the source's model: ``model.init_from``.

    Args:
        neighbours: K; expanded: M. Published: 5 and 5 on VisDA, 4 and 3 on Office-Home, 2 (or 3) and 3 on Office-31.
        low: affinity without reciprocity, and of expanded neighbours.
        diversity: weight of ``L_div``.
    """

    settings = ("closed", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"neighbours": [2, 3, 4, 5], "expanded": [2, 3, 5]}

    def __init__(self, neighbours: int = 4, expanded: int = 3, low: float = 0.1, diversity: float = 1.0) -> None:
        super().__init__(neighbours)
        if expanded < 1 or not 0 <= low <= 1 or diversity < 0:
            raise uda.UDAError(
                "NRC: expanded must be 1 or more, low a share in [0, 1], and diversity not negative."
            )
        self.expanded, self.low, self.diversity = expanded, low, diversity

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Agreement with neighbours and with theirs, and diversity."""
        probs, near = self.around(step)
        memory, b = self.memory, len(near)
        flat = near.flatten()
        wider = nearest(memory.features[flat], memory.features, self.expanded, flat).view(b, self.neighbours, -1)
        affinity = reciprocity(near, wider, step.target.index, self.low)
        log_mean = log_mean_probs(step.target.logits, over_ranks=True)
        self.log_later(reciprocal=(affinity == 1).float().mean())
        return {
            "neighbours": neighbour_agreement(probs, memory.probs[near], affinity),
            "expanded": neighbour_agreement(probs, memory.probs[wider.flatten(1)], self.low),
            "diversity": self.diversity * (log_mean.exp() * log_mean).sum(),
        }
