"""Numbers behind the figures of a report, as pure functions of numpy arrays."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from uda.errors import UDAError

Embedding = Literal["tsne", "umap", "pca"]


def confusion_matrix(label: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Counts ``[size, size]``, row = truth, column = prediction; rows with ``y < 0`` (no label) are left out."""
    known = y >= 0
    out = np.zeros((size, size), dtype=np.int64)
    np.add.at(out, (np.minimum(y[known], size - 1), np.minimum(label[known], size - 1)), 1)
    return out


def class_accuracies(confusion: np.ndarray) -> np.ndarray:
    """Share of each true class that is predicted as itself ``[C]``; NaN for a class that does not occur."""
    seen = confusion.sum(1)
    return np.where(seen > 0, confusion.diagonal() / np.maximum(seen, 1), np.nan)


def confused_pairs(confusion: np.ndarray, count: int) -> list[tuple[int, int, int, float]]:
    """Most frequent mistakes as ``(truth, prediction, number, share of the true class)``, most frequent first."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:count]
    pairs = [tuple(map(int, np.unravel_index(i, wrong.shape))) for i in order]
    return [(t, p, int(wrong[t, p]), wrong[t, p] / confusion[t].sum()) for t, p in pairs if wrong[t, p] > 0]


@dataclass(frozen=True)
class Reliability:
    """Confidence against accuracy in bins of equal width over [0, 1].

    Attributes:
        edges: ``[B + 1]``; ``count``: samples in each bin ``[B]``.
        confidence, accuracy: means in each bin ``[B]``, NaN in an empty one.
        ece: expected calibration error, the mean of ``|accuracy - confidence|`` weighted by ``count``.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float


def reliability(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> Reliability:
    """Reliability of predictions (Guo et al. 2017, ECE as in Naeini et al. 2015).

    Args:
        confidence: of each prediction ``[N]`` in [0, 1]; bins are open on the left, closed on the right.
        correct: whether it is right ``[N]``.
        bins: their number.

    Raises:
        UDAError: no samples.
    """
    confidence, correct = np.asarray(confidence, np.float64), np.asarray(correct, np.float64)
    if not len(confidence):
        raise UDAError("a reliability diagram needs at least one prediction with a label.")
    edges = np.linspace(0.0, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    some = np.maximum(count, 1)
    mean = np.bincount(which, confidence, bins) / some
    accuracy = np.bincount(which, correct, bins) / some
    ece = float((count * np.abs(accuracy - mean)).sum() / count.sum())
    empty = np.where(count > 0, 0.0, np.nan)
    return Reliability(edges, count, mean + empty, accuracy + empty, ece)


def subsample(n: int, limit: int, seed: int = 0) -> np.ndarray:
    """At most ``limit`` of ``n`` positions in rising order, a function of ``seed`` and ``n`` alone; 0: all."""
    if limit <= 0 or n <= limit:
        return np.arange(n)
    return np.sort(np.random.default_rng([seed, n]).permutation(n)[:limit])


def check_embedding(how: str) -> None:
    """Refuse UMAP where it is not installed.

    Raises:
        UDAError: with what to do.
    """
    if how == "umap" and importlib.util.find_spec("umap") is None:
        raise UDAError("--embedding umap needs the package umap-learn: pip install umap-learn, or take tsne or pca.")


def embed(features: np.ndarray, how: Embedding = "tsne", seed: int = 0) -> np.ndarray:
    """Features ``[N, F]`` in a plane ``[N, 2]``, all domains together.

    t-SNE and UMAP start from the first (at most 50) principal components.

    Args:
        features: of all domains, N at least 5.
        how: ``tsne`` (scikit-learn), ``umap`` (umap-learn) or ``pca``.
        seed: of everything random.
    """
    check_embedding(how)
    from sklearn.decomposition import PCA

    features = np.asarray(features, dtype=np.float64)
    n, width = features.shape
    parts = min(2 if how == "pca" else 50, n, width)
    reduced = PCA(parts, random_state=seed).fit_transform(features)
    if how == "pca" or reduced.shape[1] < 2:
        return np.pad(reduced, ((0, 0), (0, 2 - reduced.shape[1])))
    reduced = (reduced / max(reduced.std(), 1e-12)).astype(np.float32)
    if how == "umap":
        import umap

        return np.asarray(umap.UMAP(random_state=seed).fit_transform(reduced))
    from sklearn.manifold import TSNE

    return TSNE(2, perplexity=min(30.0, (n - 1) / 3), init="pca", random_state=seed).fit_transform(reduced)


def mixing(features: np.ndarray, is_target: np.ndarray, k: int = 10) -> float:
    """How far the domains lie within each other in feature space: 0 is apart, about 1 is like one domain.

    Among the ``k`` nearest neighbours of each sample, the share that is of the other domain, over the share that
    would be expected if domains did not matter; mean of both domains.
    """
    from sklearn.neighbors import NearestNeighbors

    is_target = np.asarray(is_target, bool)
    n = len(is_target)
    k = min(k, n - 1)
    near = NearestNeighbors(n_neighbors=k + 1).fit(features).kneighbors(features, return_distance=False)[:, 1:]
    other = is_target[near] != is_target[:, None]
    shares = [other[is_target == d].mean() / ((is_target != d).sum() / (n - 1)) for d in (False, True)]
    return float(np.mean(shares))


def worst_mistakes(score: np.ndarray, label: np.ndarray, y: np.ndarray, count: int, per_pair: int = 4) -> np.ndarray:
    """Positions of the most confident wrong predictions among labelled rows, most confident first.

    At most ``per_pair`` of one true and one predicted class (0: any number), so that a frequent pair leaves room.
    """
    wrong = np.flatnonzero((y >= 0) & (label != y))
    out, seen = [], Counter()
    for k in wrong[np.argsort(-score[wrong], kind="stable")]:
        pair = (int(y[k]), int(label[k]))
        seen[pair] += 1
        if len(out) < count and (not per_pair or seen[pair] <= per_pair):
            out.append(int(k))
    return np.array(out, dtype=np.int64)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's correlation where both are finite; None for fewer than three pairs or a constant."""
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or np.ptp(a[both]) == 0 or np.ptp(b[both]) == 0:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(a[both], b[both]).statistic)


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys as on the command line (without ``init_args``); lists are values."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    out: dict[str, Any] = {}
    for key, value in config.items():
        below = f"{prefix}.{key}" if prefix else str(key)
        out |= flat(value, prefix if key == "init_args" and value else below)
    return out


def differences(configs: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Settings that are not the same in all configs, by dotted key; ``...`` where a config has no such key.

    What is null or empty in one config and a section in another is given by the section's keys alone.
    """
    tables = [flat(c) for c in configs]
    keys = list(dict.fromkeys(k for t in tables for k in t))
    sections = {".".join(k.split(".")[:i]) for k in keys for i in range(1, k.count(".") + 1)}
    rows = {
        k: [t.get(k, ...) for t in tables]
        for k in keys
        if not (k in sections and all(t.get(k) in (None, {}, ...) for t in tables))
    }
    return {k: v for k, v in rows.items() if any(x != v[0] for x in v[1:])}
