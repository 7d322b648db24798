"""A memory of items and their sub-prototypes: its start, and how samples address it (MemSPM: Lai et al., ICLR 2024)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.nn import full, no_autocast
from uda_universal.matching import kmeans


def address(
    z: Tensor, memory: Tensor, top: int, temperature: float = 1.0, threshold: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights over the nearest items of a memory, each by its best sub-prototype.

    ``w`` is the softmax of cosines over T among all N x S sub-prototypes. Of each item the best one stands for it;
    weights up to a threshold are cut off (``max(w - l, 0) w / |w - l|``) and the rest scaled to sum 1. The threshold is
    adaptive, so that the ``top`` items stay, or a fixed one.

    Args:
        z: ``[B, D]``; memory: ``[N, S, D]``; top: K, items that stay.
        threshold: a fixed l instead; a sample none of whose items passes keeps the best one.

    Returns:
        Weights ``[B, K]`` with gradient, falling; items ``[B, K]``; their sub-prototypes ``[B, K]``. K is N with a
        fixed threshold, where some weights are 0.
    """
    with no_autocast(z):
        m = F.normalize(full(memory), dim=2)
        cosine = (F.normalize(full(z), dim=1).to(m) @ m.flatten(0, 1).T / temperature).unflatten(1, memory.shape[:2])
        best, sub = cosine.max(2)
        logit, item = best.topk(len(memory) if threshold is not None else min(top, len(memory)), dim=1)
        if threshold is not None:
            cut = (logit - cosine.flatten(1).logsumexp(1, keepdim=True)).exp() <= threshold
            cut[:, 0] = False
            logit = logit.masked_fill(cut, -torch.inf)
        return logit.softmax(1), item, sub.gather(1, item)


def read(memory: Tensor, weights: Tensor, item: Tensor, sub: Tensor) -> Tensor:
    """``sum_i w_i m_i`` ``[B, D]`` over addressed sub-prototypes; see :func:`address`."""
    rows = item * memory.shape[1] + sub
    return torch.bmm(weights[:, None].to(memory.dtype), memory.flatten(0, 1)[rows])[:, 0]


@torch.no_grad()
def first_memory(z: Tensor, items: int, subs: int, seed: int) -> Tensor:
    """A memory ``[N, S, D]`` from features ``[M, D]``: k-means for the items, and again within each for its parts.

    An item of fewer samples than parts repeats them; both are at the scale of the features.
    """
    z = z.float()
    unit = F.normalize(z, dim=1)
    code = kmeans(unit, min(items, len(z)), seed=seed)[1] if items < len(z) else torch.arange(len(z), device=z.device)
    memory = z.new_zeros(items, subs, z.shape[1])
    count = int(code.max()) + 1
    for i in range(items):  # once a run
        rows = torch.nonzero(code == i % count)[:, 0]
        part = torch.arange(len(rows), device=z.device) if len(rows) <= subs else kmeans(unit[rows], subs, seed=seed)[1]
        own = F.one_hot(part, subs).to(z.dtype)
        means = own.T @ z[rows] / own.sum(0).clamp_min(1)[:, None]
        memory[i] = means[torch.arange(subs, device=z.device) % min(len(rows), subs)]
    return memory
