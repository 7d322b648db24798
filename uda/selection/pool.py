"""The common pool: features, logits and source labels that scores of whole domains read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from uda.nn.bank import gather_rows


@dataclass
class ScorePool:
    """Rows of both domains on the CPU in float32. There is no place for a target label.

    Attributes:
        target_features: ``[N, F]``; ``target_logits``: ``[N, C]``.
        source_features: ``[M, F]``; ``source_logits``: ``[M, C]``; ``source_y``: class ids ``[M]``; M = 0
            where
            there is no source. Of several sources, the rows are put together.
        class_vectors: weights of the classifier ``[C, F]``, or None.
        seed: of what scores draw.
    """

    target_features: Tensor
    target_logits: Tensor
    source_features: Tensor
    source_logits: Tensor
    source_y: Tensor
    class_vectors: Tensor | None = None
    seed: int = 0

    @cached_property
    def weights(self) -> Tensor:
        """Density ratio target / source at each source row ``[M]``, float64; computed once for all scores."""
        from uda.selection.importance import cross_fitted_weights

        return cross_fitted_weights(self.source_features, self.target_features, seed=self.seed)

    def finite(self) -> bool:
        """Whether all numbers are finite."""
        parts = (self.target_features, self.target_logits, self.source_features, self.source_logits)
        return all(bool(x.isfinite().all()) for x in parts)


class PoolScore(Metric):
    """A score of whole domains as a metric: keeps all rows that it is given."""

    higher_is_better = True
    full_state_update = False
    reads: ClassVar[str] = "pool"
    needs_source: ClassVar[bool] = False
    score: ClassVar[Callable[[ScorePool], Tensor]]

    def __init__(self, class_vectors: Tensor | None = None, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_vectors, self.seed = class_vectors, seed
        for name in ("target_features", "target_logits", "source_features", "source_logits", "source_y"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, features: Tensor, logits: Tensor, y: Tensor | None = None) -> None:
        """Rows of one domain: features ``[B, F]``, logits ``[B, C]``; source rows have ``y`` ``[B]``."""
        if y is None:
            self.target_features.append(features.detach().float())
            self.target_logits.append(logits.detach().float())
        else:
            self.source_features.append(features.detach().float())
            self.source_logits.append(logits.detach().float())
            self.source_y.append(y)

    def compute(self) -> Tensor:
        """The score as a scalar."""

        def rows(name: str, like: Tensor | None) -> Tensor:
            found = getattr(self, name)
            found = [found] if isinstance(found, Tensor) else found
            if found:
                return torch.cat(found).cpu()
            return torch.zeros(0, dtype=torch.long) if like is None else like.new_zeros(0, like.shape[1])

        f, z = rows("target_features", None), rows("target_logits", None)
        source = (rows("source_features", f), rows("source_logits", z), rows("source_y", None))
        return type(self).score(ScorePool(f, z, *source, self.class_vectors, self.seed))


def draw_order(index: Tensor, seed: int) -> Tensor:
    """A pseudo-random number for each sample index, int64 ``[n]`` (SplitMix64), the same on any machine."""
    with np.errstate(over="ignore"):
        z = index.cpu().numpy().astype(np.uint64) + np.uint64(seed % 2**32 + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64))


class RowSample:
    """Keeps the rows with the ``size`` smallest draw numbers: a uniform sample without replacement.

    Which rows those are depends on sample indices and seed alone, not on batches, workers or ranks, and no
    more than ``2 * size`` rows and a batch are held at any time.

    Args:
        size: rows to keep; 0: all.
        seed: of the draw.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size, self.seed = size, seed
        self.rows: list[tuple[Tensor, ...]] = []
        self._held = 0

    def add(self, index: Tensor, *values: Tensor) -> None:
        """Rows of a batch: ``index`` ``[B]`` and anything ``[B, ...]``, on any device."""
        index, values = index.cpu(), tuple(v.detach().cpu() for v in values)
        self.rows.append((index, *values))
        self._held += len(index)
        if self.size and self._held >= 2 * self.size:
            self._prune()

    def _prune(self) -> None:
        together = [torch.cat(c) for c in zip(*self.rows, strict=True)]
        self.rows = [self._smallest(together)]
        self._held = len(self.rows[0][0])

    def _smallest(self, columns: list[Tensor]) -> tuple[Tensor, ...]:
        if not self.size or len(columns[0]) <= self.size:
            return tuple(columns)
        keep = draw_order(columns[0], self.seed).argsort(stable=True)[: self.size]
        return tuple(c[keep] for c in columns)

    def gather(self, device: torch.device, empty: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Index and values over all ranks, in index order, on the CPU. Collective.

        Args:
            device: that the ranks exchange through.
            empty: tensors ``[0, ...]`` of index and values, for a rank that holds no row.
        """
        if self.rows:
            self._prune()
        mine = self.rows[0] if self.rows else empty
        columns = [gather_rows(c.to(device)).cpu() for c in mine]
        columns = self._smallest(columns)
        order = columns[0].argsort(stable=True)
        return tuple(c[order] for c in columns)
