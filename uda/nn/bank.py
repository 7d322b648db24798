"""Memories by sample index, equal on all ranks.

Before each forward DDP overwrites all ranks' buffers with those of rank 0. A memory is therefore written only
from data gathered over the ranks, so that there is nothing to overwrite, and all its buffers have fixed
sizes, so that a checkpoint loads into a fresh one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uda.errors import UDAError, nearest
from uda.nn.precision import no_autocast


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _row_counts(rows: int, device: torch.device) -> list[int]:
    counts = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(_world_size())]
    dist.all_gather(counts, torch.tensor([rows], device=device))
    return torch.cat(counts).tolist()


def gather_rows(tensor: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Rows of all ranks in rank order, ``[n_r, ...] -> [sum n_r, ...]``, detached.

    Without a process group these are the given rows.

    Args:
        tensor: this rank's rows; their number may differ between ranks, all other sizes must not.
        counts: rows of each rank where they are known already; saves one exchange.
    """
    tensor = tensor.detach()
    if _world_size() == 1:
        return tensor
    counts = counts or _row_counts(len(tensor), tensor.device)
    if not any(counts):
        return tensor
    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
    padded = sent.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = sent
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)]).to(tensor.dtype)


def _last_rows(index: Tensor) -> Tensor:
    """Positions of the last occurrence of each distinct value, where writes are the same on any hardware."""
    order = torch.argsort(index, stable=True)
    ordered = index[order]
    last = torch.ones_like(ordered, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]
    return order[last]


def _check_index(index: Tensor, size: int, what: str) -> None:
    if not index.numel():
        return
    low, high = (int(i) for i in torch.aminmax(index))
    if low < 0 or high >= size:
        raise UDAError(
            f"{what} holds {size} rows, but sample indices run from {low} to {high}. "
            "Indices count the samples of one domain's training pool."
        )


def gather_domain(size: int, index: Tensor, values: Tensor) -> Tensor:
    """Rows of a whole domain in index order, ``[size, ...]``, equal on all ranks; unowned rows are zero.

    Args:
        size: samples of the domain.
        index: this rank's sample indices ``[n]``; a sample belongs to exactly one rank.
        values: this rank's rows ``[n, ...]``.
    """
    _check_index(index, size, "The domain")
    rows = _last_rows(index)
    sent = values.detach().to(torch.uint8) if values.dtype == torch.bool else values.detach()
    out = sent.new_zeros(size, *values.shape[1:])
    out[index[rows]] = sent[rows]
    if _world_size() > 1:
        dist.all_reduce(out)
    return out.to(values.dtype)


class Bank(nn.Module):
    """Float32 rows by sample index: ``Bank(size, features=(256,), probs=(65,))``.

    Each name becomes a buffer ``[size, *shape]`` of zeros; the buffer ``filled`` ``[size]`` tells which rows
    have been written.

    Args:
        size: samples of the domain.
        shapes: shape of one row by name; an int is a vector's length, ``()`` a number.
    """

    filled: Tensor

    def __init__(self, size: int, **shapes: int | Sequence[int]) -> None:
        super().__init__()
        if not shapes:
            raise UDAError("A bank needs at least one named shape, such as Bank(size, features=(256,)).")
        self.size, self.names = size, tuple(shapes)
        for name, shape in shapes.items():
            if name in ("filled", "index", "momentum") or hasattr(self, name):
                raise UDAError(f"{name!r} cannot name a buffer of a bank: the name is taken.")
            self.register_buffer(name, torch.zeros(size, *([shape] if isinstance(shape, int) else shape)))
        self.register_buffer("filled", torch.zeros(size, dtype=torch.bool))

    def __len__(self) -> int:
        return self.size

    @torch.no_grad()
    def write(self, index: Tensor, *, momentum: float | None = None, **values: Tensor) -> None:
        """Write rows of all ranks, in rank order; where an index occurs more than once, the last row counts.

        All ranks must call this together, each with its own rows (their number may differ, and may be zero).

        Args:
            index: sample indices ``[n]``.
            momentum: share of the old row that stays, ``row = momentum * old + (1 - momentum) * new``; the
                first write of a row takes the new value whole.
            values: ``[n, *shape]`` for each name of the bank.
        """
        if set(values) != set(self.names):
            wrong = sorted(set(values) ^ set(self.names))[0]
            verb = "got no value for" if wrong in self.names else "has no buffer"
            raise UDAError(f"Bank.write: the bank {verb} {wrong!r}. {nearest(wrong, self.names)}")
        device = self.filled.device
        index = index.to(device, torch.long)
        counts = _row_counts(len(index), device) if _world_size() > 1 else None
        index = gather_rows(index, counts)
        _check_index(index, self.size, "The bank")
        rows = _last_rows(index)
        at = index[rows]
        with no_autocast(self.filled):
            for name in self.names:  # one order on all ranks, whatever the order of the arguments
                buffer = getattr(self, name)
                new = gather_rows(values[name].to(device, torch.float32), counts)
                if new.shape != (len(index), *buffer.shape[1:]):
                    raise UDAError(
                        f"Bank.write: {name!r} has rows of shape {tuple(buffer.shape[1:])} and {len(index)} "
                        f"indices were given, but the values have shape {tuple(new.shape)}."
                    )
                new = new[rows]
                if momentum is not None:
                    known = self.filled[at].view(-1, *[1] * (new.ndim - 1))
                    new = torch.where(known, momentum * buffer[at] + (1 - momentum) * new, new)
                buffer[at] = new
        self.filled[at] = True

    def read(self, name: str, index: Tensor | None = None) -> Tensor:
        """Rows ``[n, *shape]`` at ``index``, or the whole buffer; float32, without gradient."""
        if name not in self.names:
            raise UDAError(f"The bank has no buffer {name!r}. {nearest(name, self.names)}")
        buffer = getattr(self, name)
        return buffer if index is None else buffer[index.to(buffer.device)]

    def fingerprint(self) -> str:
        """Hash of all buffers' bytes, to compare ranks and runs."""
        digest = hashlib.sha256()
        for name in (*self.names, "filled"):
            digest.update(getattr(self, name).detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
