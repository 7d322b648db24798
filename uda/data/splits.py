"""Splits of a domain, functions of a seed and a name."""

from __future__ import annotations

import numpy as np

from uda.data.samplers import permutation


def split_by_class(
    labels: np.ndarray, fraction: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to hold back, the same share of each class, each in rising order.

    A class keeps at least one row for training. With a fraction above 0 at least one row in all is held back
    where any class has two.
    """
    held: list[np.ndarray] = []
    classes = np.unique(labels)
    for c in classes:
        members = np.flatnonzero(labels == c)
        count = min(round(fraction * len(members)), len(members) - 1)
        held.append(members[permutation(len(members), seed, name, "split", int(c))[:count]])
    back = np.sort(np.concatenate(held)) if held else np.empty(0, dtype=np.int64)
    if fraction > 0 and not len(back):
        sizes = [int((labels == c).sum()) for c in classes]
        largest = int(np.argmax(sizes))
        if sizes[largest] > 1:
            back = np.flatnonzero(labels == classes[largest])[-1:]
    return np.setdiff1d(np.arange(len(labels)), back), back


def split_by_index(
    n: int, fraction: float, seed: int, name: str, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to hold back, drawn without labels; at least one of each if n >= 2."""
    count = min(max(round(fraction * n), 1 if fraction > 0 else 0), n - 1)
    order = permutation(n, seed, name, purpose)
    return np.sort(order[count:]), np.sort(order[:count])
