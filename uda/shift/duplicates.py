"""Samples that occur twice: inside a domain, or in source and target."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def exact_hashes(x: Tensor) -> list[bytes]:
    """A hash of each row of inputs ``[N, ...]``: equal for equal values."""
    rows = np.ascontiguousarray(x.detach().cpu().numpy().reshape(len(x), -1))
    rows = rows + 0.0 if rows.dtype.kind == "f" else rows  # -0.0 and 0.0 are one value in two patterns of bits
    return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]


def difference_hash(x: Tensor) -> np.ndarray:
    """64 bits of each image ``[N, C, H, W]``: whether a cell of an 8 x 9 grid is brighter than the one to its left.

    Bool ``[N, 64]``. Survives scaling, recoding and changes of brightness and contrast.
    """
    grid = torch.nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True), (8, 9))[:, 0]
    return (grid[:, :, 1:] > grid[:, :, :-1]).flatten(1).cpu().numpy()


def exact_duplicates(source: Sequence[bytes], target: Sequence[bytes], source_y: Any | None = None) -> dict[str, int]:
    """Counts of equal rows by their hashes.

    Returns:
        ``source``, ``target``: rows that repeat an earlier row of their domain; ``across``: target rows that the
        source has as well; ``conflicts``: source inputs that occur with more than one label (-1: no labels given).
    """
    known = set(source)
    out = {
        "source": len(source) - len(known), "target": len(target) - len(set(target)),
        "across": sum(h in known for h in target), "conflicts": -1,
    }  # fmt: skip
    if source_y is not None:
        labels: dict[bytes, set[int]] = {}
        for h, label in zip(source, np.asarray(source_y).tolist(), strict=True):
            labels.setdefault(h, set()).add(int(label))
        out["conflicts"] = sum(len(found) > 1 for found in labels.values())
    return out


def near_by_cosine(source: Any, target: Any, threshold: float = 0.98) -> dict[str, int]:
    """Rows with a partner whose feature vector has a cosine above ``threshold``, exact duplicates among them.

    Features ``[N_s, F]`` and ``[N_t, F]`` are centred by their common mean: features that are never negative would
    be alike otherwise.

    Returns:
        ``source``, ``target``: rows with a partner in their own domain; ``across``: target rows with one in the source.
    """
    source, target = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    mean = np.concatenate((source, target)).mean(0)
    s, t = _unit(source - mean), _unit(target - mean)
    return _partners(lambda a, b: a @ b.T > threshold, s, t)


def near_by_hash(source: np.ndarray, target: np.ndarray, most: int = 2) -> dict[str, int]:
    """The same by perceptual hashes (bool ``[N, 64]``) that differ in at most ``most`` bits."""
    s, t = (2 * h.astype(np.float32) - 1 for h in (source, target))
    bits = s.shape[1]
    return _partners(lambda a, b: a @ b.T >= bits - 2 * most, s, t)


def _partners(alike: Any, source: np.ndarray, target: np.ndarray, block: int = 1024) -> dict[str, int]:
    def count(a: np.ndarray, b: np.ndarray) -> int:
        found = 0
        for start in range(0, len(a), block):
            hit = alike(a[start : start + block], b)
            if a is b:
                rows = np.arange(len(hit))
                hit[rows, rows + start] = False
            found += int(hit.any(1).sum())
        return found

    return {"source": count(source, source), "target": count(target, target), "across": count(target, source)}


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
