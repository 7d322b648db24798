"""Streams: which sample of which shift comes when, in batches. Labels arrange the simulation, no method sees them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uda.errors import UDAError, nearest

#: ``reset`` and ``gradual`` are ordered as ``continual``; ``stored`` as ``continual`` without shuffling.
SETTINGS = ("stored", "reset", "continual", "gradual", "mixed", "correlated", "mixed_correlated")
#: Severities of a corruption in the gradual setting.
GRADUAL = (1, 2, 3, 4, 5, 4, 3, 2, 1)


def stream_order(labels: list[np.ndarray], setting: str, seed: int, delta: float = 0.0) -> np.ndarray:
    """Rows ``[N, 2]`` of (shift, sample) in the order of the stream.

    Args:
        labels: class ids of each shift, ``[n_s]``; only correlated streams read them.
        setting: one of ``SETTINGS``; seed: of the order.
        delta: of correlated streams: 0 sorts by class; above 0, samples of a class are dealt to as many slots as there
            are classes by Dirichlet(delta), and come slot by slot.

    Raises:
        UDAError: unknown setting, nothing to stream.
    """
    if setting not in SETTINGS:
        raise UDAError(f"unknown setting {setting!r} of a stream: use {', '.join(SETTINGS)}.")
    if not labels or any(len(y) == 0 for y in labels):
        raise UDAError("the stream is empty, or one of its shifts is.")
    rng = np.random.default_rng(seed)
    pairs = [np.stack([np.full(len(y), s), np.arange(len(y))], 1) for s, y in enumerate(labels)]
    if setting == "stored":
        return np.concatenate(pairs)
    parts = [(np.concatenate(pairs), np.concatenate(labels))] if "mixed" in setting else zip(pairs, labels, strict=True)
    out = []
    for rows, y in parts:
        order = rng.permutation(len(rows))
        rows, y = rows[order], y[order]
        out.append(rows[_by_class(y, delta, rng)] if "correlated" in setting else rows)
    return np.concatenate(out)


def _by_class(y: np.ndarray, delta: float, rng: np.random.Generator) -> np.ndarray:
    classes = rng.permutation(np.unique(y))
    if delta <= 0:
        return np.concatenate([np.flatnonzero(y == c) for c in classes])
    slots: list[list[np.ndarray]] = [[] for _ in classes]
    for c in classes:
        rows = np.flatnonzero(y == c)
        cuts = (np.cumsum(rng.dirichlet(np.full(len(slots), delta)))[:-1] * len(rows)).astype(int)
        for slot, part in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[i] for slot in slots for i in rng.permutation(len(slot))])


@dataclass(frozen=True)
class Shift:
    """One domain of a stream.

    Args:
        name: for reports; x: inputs ``[N, ...]``, or a function of rows (int64 ``[B]``) for what does not fit in
            memory; y: class ids ``[N]``, -1 where unknown, or None.
        size: N, where x is a function; ids: a name for each sample, or None.
    """

    name: str
    x: Tensor | Callable[[Tensor], Tensor]
    y: np.ndarray | None = None
    size: int = 0
    ids: list[str] | None = None

    def __len__(self) -> int:
        return len(self.x) if isinstance(self.x, Tensor) else self.size

    def fetch(self, rows: np.ndarray) -> Tensor:
        """Inputs ``[B, ...]``."""
        index = torch.as_tensor(rows)
        return self.x[index] if isinstance(self.x, Tensor) else self.x(index)


@dataclass(frozen=True)
class StreamBatch:
    """Inputs ``x`` and what they are: ``rows`` ``[B, 2]`` of (shift, sample), oracle labels ``y`` ``[B]`` (-1: none).

    ``border``: the first batch of a shift in a stream whose borders a method is told (``reset``).
    """

    number: int
    x: Tensor
    y: np.ndarray
    rows: np.ndarray
    border: bool


class Stream:
    """Batches of shifts in a setting; a function of its arguments, so that it can be entered anywhere.

    Args:
        shifts: in the order of the stream; for ``gradual`` each corruption at the severities of ``GRADUAL``.
        setting: one of ``SETTINGS``. ``reset``: the adapter starts again at each shift.
        batch_size: samples a batch; a batch does not cross the border of shifts, but in mixed settings.
        seed: of the order; delta: of correlated settings, see :func:`stream_order`.
        limit: at most so many samples of each shift, drawn by the seed; None: all.

    Raises:
        UDAError: nothing to stream, unlike shapes, NaN among tensors, a correlated setting without labels.
    """

    def __init__(
        self, shifts: list[Shift], setting: str = "continual", batch_size: int = 64, seed: int = 0, delta: float = 0.0,
        limit: int | None = None,
    ) -> None:  # fmt: skip
        if setting not in SETTINGS:
            raise UDAError(f"unknown setting {setting!r} of a stream. {nearest(setting, SETTINGS)}")
        if batch_size < 1 or (limit is not None and limit < 1):
            raise UDAError(f"a stream's batch_size and limit are 1 or more, not {batch_size} and {limit}.")
        if not shifts or not all(map(len, shifts)):
            raise UDAError("the stream is empty, or one of its shifts is.")
        self.shifts, self.setting, self.batch_size, self.seed = shifts, setting, batch_size, seed
        self._check(shifts)
        self.labels = [np.full(len(s), -1) if s.y is None else np.asarray(s.y) for s in shifts]
        if "correlated" in setting and any((y < 0).any() for y in self.labels):
            raise UDAError(f"a {setting} stream is a simulation that is ordered by class: it needs every label.")
        rng, kept = np.random.default_rng([seed, 1]), [np.arange(len(s)) for s in shifts]
        if limit is not None:  # in stored order
            kept = [np.sort(rng.permutation(len(k))[:limit]) for k in kept]
        order = stream_order([y[k] for y, k in zip(self.labels, kept, strict=True)], setting, seed, delta)
        self.rows = np.stack([order[:, 0], [kept[s][i] for s, i in order]], 1)
        self._bounds = self._batches()

    @staticmethod
    def _check(shifts: list[Shift]) -> None:
        shapes = {}
        for shift in shifts:
            first = shift.fetch(np.arange(1))
            shapes.setdefault(tuple(first.shape[1:]), shift.name)
            held = shift.x if isinstance(shift.x, Tensor) else first
            if held.is_floating_point() and not bool(torch.isfinite(held).all()):
                raise UDAError(f"shift {shift.name!r} has NaN or infinite inputs. Remove or impute them.")
            if shift.y is not None and len(shift.y) != len(shift):
                raise UDAError(f"shift {shift.name!r} has {len(shift)} inputs and {len(shift.y)} labels.")
        if len(shapes) > 1:
            (a, one), (b, two), *_ = shapes.items()
            raise UDAError(f"inputs of shape {a} in shift {one!r} and {b} in {two!r}: resize them alike.")

    def _batches(self) -> list[tuple[int, int]]:
        n, cuts = len(self.rows), [0]
        if "mixed" not in self.setting:
            cuts += (np.flatnonzero(np.diff(self.rows[:, 0])) + 1).tolist()
        cuts.append(n)
        return [(i, min(i + self.batch_size, b)) for a, b in itertools.pairwise(cuts)
                for i in range(a, b, self.batch_size)]  # fmt: skip

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._bounds)

    def __getitem__(self, number: int) -> StreamBatch:
        """One batch."""
        a, b = self._bounds[number]
        rows, parts = self.rows[a:b], []
        for s in np.unique(rows[:, 0]):
            parts.append((np.flatnonzero(rows[:, 0] == s), self.shifts[s].fetch(rows[rows[:, 0] == s, 1])))
        x = parts[0][1] if len(parts) == 1 else torch.empty((len(rows), *parts[0][1].shape[1:]))
        if len(parts) > 1:
            for at, value in parts:
                x[torch.as_tensor(at)] = value
        y = np.array([self.labels[s][i] for s, i in rows])
        border = self.setting == "reset" and number > 0 and self.rows[a, 0] != self.rows[a - 1, 0]
        return StreamBatch(number, x, y, rows, bool(border))

    def fingerprint(self) -> str:
        """Of the order and the names of the shifts: a state belongs to one stream."""
        names = ",".join(f"{s.name}:{len(s)}" for s in self.shifts)
        told = f"{names} {self.setting} {self.batch_size}".encode()
        return hashlib.sha256(told + np.ascontiguousarray(self.rows, dtype=np.int64).tobytes()).hexdigest()
