"""Memory of a whole target and nearest neighbours in it: what NRC and AaD share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import Bank, full, no_autocast


@torch.no_grad()
def nearest(
    queries: Tensor,
    memory: Tensor,
    k: int,
    without: Tensor | None = None,
    chunk: int = 2**24,
    euclidean: bool = False,
) -> Tensor:
    """Rows of ``memory`` with the largest inner products, ``[B, k]``, in chunks of at most ``chunk`` products.

    Args:
        queries: ``[B, F]``; memory: ``[N, F]``; without: a row that is left out for each query ``[B]``.
        euclidean: the smallest distances instead.
    """
    rows = max(1, chunk // max(len(memory), 1))
    found = []
    with no_autocast(queries):
        memory = full(memory)
        # |q - m|^2 = |q|^2 - 2 (q . m - |m|^2 / 2)
        shift = memory.square().sum(1) / 2 if euclidean else None
        room = memory.new_empty(min(rows, len(queries)), len(memory))  # one for all chunks: new pages cost time
        for start in range(0, len(queries), rows):
            block = full(queries[start : start + rows])
            part = torch.mm(block, memory.T, out=room[: len(block)])
            if shift is not None:
                part -= shift
            if without is not None:
                part.scatter_(1, without[start : start + rows, None], -torch.inf)
            found.append(largest(part, k))
    return torch.cat(found)


def largest(values: Tensor, k: int, width: int = 64) -> Tensor:
    """Columns of the k largest values of each row, ``[B, N] -> [B, k]``, in falling order.

    Of many columns the k blocks of ``width`` with the largest maxima hold them all: only these are sorted.
    """
    blocks = values.shape[1] // width
    if blocks <= k:
        return values.topk(k, dim=1).indices
    tops = values[:, : blocks * width].unflatten(1, (blocks, width)).amax(2).topk(k, dim=1).indices
    columns = (tops[:, :, None] * width + torch.arange(width, device=values.device)).flatten(1)
    rest = torch.arange(blocks * width, values.shape[1], device=values.device).expand(len(values), -1)
    columns = torch.cat([columns, rest], 1)
    return columns.gather(1, values.gather(1, columns).topk(k, dim=1).indices)


class NeighbourMemory(uda.Plugin):
    """Base: features (of length 1: ``keys``) and class probabilities of each target sample, the last that were seen.

    Filled from the whole target at the start of the run, then written for the batch after each step.

    Args:
        neighbours: K of a sample.
    """

    def __init__(self, neighbours: int) -> None:
        super().__init__()
        if neighbours < 1:
            raise uda.UDAError(f"{type(self).__name__}: neighbours must be 1 or more, not {neighbours}.")
        self.neighbours, self.multi_label = neighbours, False
        self.memory: Bank | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone; whole, for the start."""
        return uda.DataNeeds(source=False, refresh={"target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The memory.

        Raises:
            UDAError: fewer target samples than neighbours.
        """
        size = model.sizes.get(model.target_name, 0)
        if size and size <= self.neighbours + 1:
            raise uda.UDAError(f"{type(self).__name__}: {size} target samples have no {self.neighbours} neighbours.")
        self.multi_label = bool(model.multi_label)
        if self.memory is None:
            self.memory = Bank(max(size, 1), features=model.feature_dim, probs=model.num_classes)

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Fill the memory, once."""
        if not bool(self.memory.filled.all()):
            pool = bank.target
            self._write(torch.arange(len(pool.features), device=pool.features.device), pool.features, pool.logits)

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """What the batch was in this step."""
        self._write(step.target.index, step.target.features, step.target.logits)

    def _write(self, index: Tensor, features: Tensor, logits: Tensor) -> None:
        with no_autocast(features):
            keys, probs = self.keys(features), full(logits)
            probs = probs.sigmoid() if self.multi_label else probs.softmax(1)
        self.memory.write(index, features=keys, probs=probs)

    def keys(self, features: Tensor) -> Tensor:
        """What the memory keeps of features ``[B, F]``: their direction."""
        return F.normalize(full(features), dim=1)

    def around(self, step: uda.Step) -> tuple[Tensor, Tensor]:
        """Class probabilities of the batch ``[B, C]``, with gradient, and rows of its neighbours ``[B, K]``."""
        index, features, logits = step.target.index, step.target.features, step.target.logits
        with no_autocast(features):
            keys = self.keys(features.detach())
            return full(logits).softmax(1), nearest(keys, self.memory.features, self.neighbours, index)
