"""Endless sampling orders that are pure functions of a seed and a position.

A domain's stream is the concatenation of permutations of its pool, pass k seeded by (seed, name, k). Step s
of a run takes the global batch at positions ``[s * G, (s + 1) * G)`` with ``G = batch_size * world_size``,
and rank r its slice of it. So a short domain cycles in a new order each time, nothing is dropped, ranks never
share a sample within a pass, and a resumed run needs only the number of batches done.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import Any

import numpy as np

_CACHED_PERMUTATIONS = 4


def derive_seed(seed: int, *parts: Any) -> int:
    """A 63-bit seed for a purpose named by ``parts``; equal on every machine and in every process."""
    text = repr((int(seed), *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def permutation(n: int, seed: int, *parts: Any) -> np.ndarray:
    """Permutation of ``range(n)``, int64, a function of its arguments alone."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *parts))).permutation(n)


class _Cache:
    """The last few permutations: a stream walks one pass at a time, so two would do."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: OrderedDict[Any, np.ndarray] = OrderedDict()

    def get(self, key: Any, n: int, seed: int, *parts: Any) -> np.ndarray:
        if key in self.kept:
            self.kept.move_to_end(key)
            return self.kept[key]
        value = self.kept[key] = permutation(n, seed, *parts)
        if len(self.kept) > self.size:
            self.kept.popitem(last=False)
        return value


class UniformStream:
    """Concatenated permutations of a pool.

    Args:
        members: pool positions to draw from (int64), or their number.
        seed: of the run.
        name: of the stream; streams of different names are independent.
    """

    def __init__(self, members: np.ndarray | int, seed: int, name: str) -> None:
        self.members = np.arange(members) if isinstance(members, int) else np.asarray(members, dtype=np.int64)
        self.seed, self.name = seed, name
        self._cache = _Cache(_CACHED_PERMUTATIONS)

    def __len__(self) -> int:
        return len(self.members)

    def take(self, start: int, stop: int) -> np.ndarray:
        """Pool positions at stream positions ``start`` to ``stop``, int64 of length ``stop - start``."""
        n, parts = len(self.members), []
        while start < stop:
            k, offset = divmod(start, n)
            count = min(stop - start, n - offset)
            parts.append(self._cache.get(k, n, self.seed, self.name, k)[offset : offset + count])
            start += count
        order = parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, dtype=np.int64)])
        return self.members[order]


class ClassBalancedStream:
    """Every class once a round, the classes of a round in random order, each class its own stream.

    Round r holds stream positions ``[r * C, (r + 1) * C)``; the class at a slot comes from the permutation of
    round r, and its sample is number r of that class's own concatenated permutations. All of it is stateless.

    Args:
        labels: class id of each pool position, int64 [n].
        seed: of the run.
        name: of the stream.
    """

    def __init__(self, labels: np.ndarray, seed: int, name: str) -> None:
        labels = np.asarray(labels)
        self.classes = np.unique(labels)
        self.by_class = [np.flatnonzero(labels == c) for c in self.classes]
        self.seed, self.name, self.n = seed, name, len(labels)
        self._rounds = _Cache(64)
        self._within = _Cache(2 * len(self.classes))

    def __len__(self) -> int:
        return self.n

    def take(self, start: int, stop: int) -> np.ndarray:
        """Pool positions at stream positions ``start`` to ``stop``, int64 of length ``stop - start``."""
        count = len(self.classes)
        out = np.empty(stop - start, dtype=np.int64)
        for i, position in enumerate(range(start, stop)):
            turn, slot = divmod(position, count)
            c = int(self._rounds.get(turn, count, self.seed, self.name, "round", turn)[slot])
            members = self.by_class[c]
            k, offset = divmod(turn, len(members))
            order = self._within.get((c, k), len(members), self.seed, self.name, "class", c, k)
            out[i] = members[order[offset]]
        return out


def rank_slice(step: int, batch_size: int, rank: int, world: int) -> tuple[int, int]:
    """Stream positions ``(start, stop)`` of one rank's batch at one step."""
    start = (step * world + rank) * batch_size
    return start, start + batch_size


def shard(n: int, rank: int, world: int) -> np.ndarray:
    """Indices ``rank, rank + world, ...`` below n, padded with 0 to the length that rank 0 has.

    Ranks that are one short get index 0, which only rank 0 owns: drop rows with :func:`valid_rows`.
    """
    own = np.arange(rank, n, world, dtype=np.int64)
    return np.concatenate([own, np.zeros(-(-n // world) - len(own), dtype=np.int64)])


def valid_rows(index: Any, rank: int, world: int) -> Any:
    """Boolean mask [B] of the rows of an evaluation or pool batch that this rank owns; the others are
    padding.

    Args:
        index: the batch's ``index``, int64 [B].
        rank: of this process.
        world: number of processes.
    """
    return index % world == rank
