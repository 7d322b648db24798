"""A small memory of earlier domains: exemplars of each class by herding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Memory = dict[str, Tensor]


def herding(features: Tensor, count: int) -> Tensor:
    """Rows whose mean follows the mean of all, the most telling first (iCaRL: Rebuffi et al., CVPR 2017, algorithm 4).

    Args:
        features: ``[N, D]``, of one class; they are brought to length 1. count: at most so many.

    Returns:
        Row numbers ``[min(count, N)]``.
    """
    f = F.normalize(features.double(), dim=1)
    mean, total = f.mean(0), torch.zeros_like(f[0])
    free = torch.ones(len(f), dtype=torch.bool, device=f.device)
    chosen: list[int] = []
    for k in range(1, min(count, len(f)) + 1):
        distance = ((total + f) / k - mean).square().sum(1).masked_fill(~free, torch.inf)
        chosen.append(int(distance.argmin()))
        free[chosen[-1]] = False
        total = total + f[chosen[-1]]
    return torch.tensor(chosen, dtype=torch.long)


def with_domain(
    memory: Memory | None, features: Tensor, y: Tensor, take: Callable[[Tensor], Tensor], size: int, classes: int
) -> Memory:
    """The memory with a further domain, in the same room: older domains keep the first of each class.

    Args:
        memory: ``x``, ``y``, ``domain`` and ``rank`` (place in its class and domain, 0 the most telling); None: empty.
        features, y: of the new domain, ``[N, D]`` and ``[N]``; take: gives the inputs of rows ``[R]``.
        size: exemplars of all domains together.

    Returns:
        With ``size // (classes * domains)`` exemplars of each class and domain, one at least.
    """
    number = 0 if memory is None else int(memory["domain"].max()) + 1
    each = max(1, size // (classes * (number + 1)))
    parts: dict[str, list[Tensor]] = {k: [] for k in ("x", "y", "domain", "rank")}
    if memory is not None:
        for k, values in parts.items():
            values.append(memory[k][memory["rank"] < each])
    for c in y[y >= 0].unique().tolist():  # -1: an image that could not be read
        own = (y == c).nonzero().flatten()
        rows = own[herding(features[own], each)]
        rank = torch.arange(len(rows))
        for k, v in {"x": take(rows), "y": y[rows], "domain": torch.full_like(rank, number), "rank": rank}.items():
            parts[k].append(v)
    return {k: torch.cat(v) for k, v in parts.items()}


@torch.no_grad()
def domain_features(model: Any, loader: Any) -> tuple[Tensor, Tensor | None]:
    """Features and (of a source) labels of a domain in index order, on the CPU."""
    parts: dict[str, list[Tensor]] = {"index": [], "f": [], "y": []}
    for batch in loader:
        parts["index"].append(batch["index"])
        parts["f"].append(model.batch(batch["x"].to(model.device)).features.float().cpu())
        parts["y"] += [batch["y"]] if "y" in batch else []
    order = torch.cat(parts["index"]).argsort()
    return torch.cat(parts["f"])[order], torch.cat(parts["y"])[order] if parts["y"] else None
