"""Splits of a domain, functions of a seed and a name."""

from __future__ import annotations

import numpy as np

from uda.data.samplers import permutation


def split_by_class(
    labels: np.ndarray, fraction: float, seed: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to hold back, the same share of each class, each in rising order.

    Shares are rounded so that the total comes out right (largest remainder). Every class keeps at least one
    row for training. With a fraction above 0 at least one row is held back, where any class has two.
    """
    classes, sizes = np.unique(labels, return_counts=True)
    total = max(round(fraction * len(labels)), 1 if fraction > 0 else 0)
    quota = fraction * sizes
    counts = np.minimum(np.floor(quota).astype(np.int64), sizes - 1)
    by_remainder = np.argsort(-(quota - np.floor(quota)), kind="stable")
    for i in by_remainder[: max(0, total - int(counts.sum()))]:
        counts[i] += counts[i] < sizes[i] - 1
    held = [np.empty(0, dtype=np.int64)]
    for c, count in zip(classes, counts, strict=True):
        members = np.flatnonzero(labels == c)
        held.append(members[permutation(len(members), seed, name, "split", int(c))[:count]])
    back = np.sort(np.concatenate(held))
    if total and not len(back) and sizes.max() > 1:
        back = np.flatnonzero(labels == classes[int(np.argmax(sizes))])[-1:]
    return np.setdiff1d(np.arange(len(labels)), back), back


def split_by_index(
    n: int, fraction: float, seed: int, name: str, purpose: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions to train on and to hold back, drawn without labels; at least one of each if n >= 2."""
    count = min(max(round(fraction * n), 1 if fraction > 0 else 0), n - 1)
    order = permutation(n, seed, name, purpose)
    return np.sort(order[count:]), np.sort(order[:count])
