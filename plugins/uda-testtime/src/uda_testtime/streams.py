"""Orders of a stream: which sample of which shift comes when. Labels arrange the simulation, no method sees them."""

from __future__ import annotations

import numpy as np

from uda.errors import UDAError

SETTINGS = ("continual", "mixed", "correlated", "mixed_correlated")


def stream_order(labels: list[np.ndarray], setting: str, seed: int, delta: float = 0.0) -> np.ndarray:
    """Rows ``[N, 2]`` of (shift, sample) in the order of the stream.

    Args:
        labels: class ids of each shift, ``[n_s]``; setting: one of ``SETTINGS``; seed: of the order.
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
