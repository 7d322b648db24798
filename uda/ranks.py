"""Averages over the processes of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def mean_over_ranks(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each tensor's mean over all processes, in one exchange; the tensors themselves on a single process.

    All processes must call it, with tensors of equal shapes.
    """
    tensors = tuple(tensors)
    if not (tensors and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return tensors
    flat = torch.cat([t.float().flatten() for t in tensors])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([t.numel() for t in tensors])
    return tuple(f.view_as(t).to(t.dtype) for f, t in zip(parts, tensors, strict=True))


def of_all_ranks(value: Tensor) -> Tensor:
    """What each process has, ``[...] -> [processes, ...]``, for a loss of the whole batch that every process computes.

    Only the own part has a gradient, times the number of processes: the mean of the processes' gradients, which
    DistributedDataParallel takes, is then that of one process with the batches of all. All processes must call it, with
    tensors of equal shapes.
    """
    if not (dist.is_available() and dist.is_initialized() and (world := dist.get_world_size()) > 1):
        return value[None]
    parts = [torch.empty_like(value) for _ in range(world)]
    dist.all_gather(parts, value.detach().contiguous())
    parts[dist.get_rank()] = value.detach() + world * (value - value.detach())
    return torch.stack(parts)
