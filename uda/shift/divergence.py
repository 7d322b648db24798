"""How far apart two samples are: domain classifiers, MMD, a classifier's outputs, and rows like none of the source.

All take plain arrays of rows ``[N, F]`` and draw by a seed of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from uda.errors import UDAError


@dataclass(frozen=True)
class DomainClassifier:
    """What a domain classifier reaches on rows that it was not trained on.

    Attributes:
        error: mean of the error rates on the two domains, so that their sizes do not matter; 0.5 is chance.
        pad: proxy A-distance ``2 (1 - 2 error)``, with its interval from ``pad_low`` to ``pad_high``.
        p_value: of the hypothesis that the domains cannot be told apart (error 0.5 or more).
        source_rows, target_rows: that were classified.
    """

    error: float
    pad: float
    pad_low: float
    pad_high: float
    p_value: float
    source_rows: int
    target_rows: int


@dataclass(frozen=True)
class Discrepancy:
    """Squared MMD with its permutation p-value."""

    mmd2: float
    p_value: float
    bandwidth: float
    permutations: int
    source_rows: int
    target_rows: int


def proxy_a_distance(error: float) -> float:
    """``2 (1 - 2 error)`` of a domain classifier's held-out error (Ben-David et al. 2007); 2: told apart always.

    Below 0 the classifier is worse than chance on held-out rows, which is noise, or a sign of features that were
    centred for each domain on its own.
    """
    return 2.0 * (1.0 - 2.0 * error)


def domain_classifier(
    source: Any,
    target: Any,
    kind: Literal["linear", "trees"] = "linear",
    *,
    folds: int = 3,
    level: float = 0.95,
    seed: int = 0,
) -> DomainClassifier:
    """Train a classifier to tell two samples apart, and test it on rows held out (in ``folds`` turns).

    Args:
        source: features ``[N_s, F]``; ``target``: ``[N_t, F]``.
        kind: ``linear``: logistic regression on standardised features, the usual proxy; ``trees``: gradient boosted
            trees on (at most 50) principal components, which see what moves no mean. Both domains count alike.
        folds: parts; each is classified by a model of the others.
        level: of the interval, by the normal law on the two error rates.
        seed: of the parts.

    Raises:
        UDAError: fewer than two rows a part, or other widths.
    """
    from scipy.stats import norm

    source, target = _pair(source, target, 2 * folds)
    x = np.concatenate((source, target))
    y = np.concatenate((np.zeros(len(source)), np.ones(len(target))))
    rng = np.random.default_rng(seed)
    part = np.concatenate([rng.permutation(np.arange(n) % folds) for n in (len(source), len(target))])
    wrong = np.empty(len(x), dtype=bool)
    for k in range(folds):
        train, test = np.flatnonzero(part != k), part == k
        if kind == "trees":  # as many rows of each domain: row weights make these trees fifty times slower
            sides = [rng.permutation(train[y[train] == d]) for d in (0, 1)]
            least = min(map(len, sides))
            train = np.concatenate([side[:least] for side in sides])
        wrong[test] = _predict(kind, x[train], y[train], x[test]) != y[test]
    rates, sizes = np.array([wrong[y == d].mean() for d in (0, 1)]), np.array([len(source), len(target)])
    error = float(rates.mean())
    # half a wrong row more on each side keeps the interval open where there is no error at all
    smooth = (rates * sizes + 0.5) / (sizes + 1)
    spread = float(np.sqrt((smooth * (1 - smooth) / sizes).sum()) / 2)
    by_chance = float(np.sqrt((0.25 / sizes).sum()) / 2)
    reach = float(norm.ppf((1 + level) / 2)) * spread
    low, high = max(error - reach, 0.0), min(error + reach, 1.0)
    p_value = float(norm.cdf((error - 0.5) / by_chance))
    return DomainClassifier(
        error, proxy_a_distance(error), proxy_a_distance(high), proxy_a_distance(low), p_value, *map(int, sizes)
    )


def _predict(kind: str, x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    if kind == "linear":
        from sklearn.linear_model import LogisticRegression

        mean, scale = moments(x)
        model = LogisticRegression(C=0.1, max_iter=200, tol=1e-3, class_weight="balanced")
        return model.fit((x - mean) / scale, y).predict((query - mean) / scale)
    if kind == "trees":
        from sklearn.ensemble import HistGradientBoostingClassifier

        to = components(x)
        model = HistGradientBoostingClassifier(max_iter=60, early_stopping=False, random_state=0)
        return model.fit(to(x), y).predict(to(query))
    raise UDAError(f"domain classifier {kind!r} must be 'linear' or 'trees'.")


def mmd(
    source: Any, target: Any, *, permutations: int = 999, cap: int = 1000, bandwidth: float | None = None, seed: int = 0
) -> Discrepancy:
    """Squared maximum mean discrepancy, unbiased, with a Gaussian kernel, and its permutation test.

    ``mean_{i != j} k(s_i, s_j) + mean_{i != j} k(t_i, t_j) - 2 mean_{ij} k(s_i, t_j)`` with
    ``k(a, b) = exp(-||a - b||^2 / (2 h^2))`` on features standardised over both samples (Gretton et al. 2012,
    lemma 6); the p-value is the share of relabelled samples with at least that value, the real one among them.

    Args:
        source: features ``[N_s, F]``; ``target``: ``[N_t, F]``; more than ``cap`` rows are drawn from.
        permutations: relabellings; the smallest p-value is ``1 / (permutations + 1)``.
        bandwidth: ``h``; None: the median distance over both samples.
        seed: of rows and relabellings.
    """
    rng = np.random.default_rng(seed)
    source, target = _pair(source, target, 2)
    source, target = (z[rng.permutation(len(z))[:cap]] for z in (source, target))
    z = np.concatenate((source, target))
    mean, scale = moments(z)
    square = _square_distances(z := (z - mean) / scale, z)
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.median(square[np.triu_indices(len(z), 1)]))) or 1.0
    kernel = np.exp(square / (-2 * bandwidth**2)).astype(np.float32)
    np.fill_diagonal(kernel, 0.0)
    n, m = len(source), len(target)
    first = np.concatenate((np.ones(n, np.float32), np.zeros(m, np.float32)))
    chosen = np.stack([first, *(rng.permutation(first) for _ in range(permutations))])
    # with a = chosen, K the kernel and 1 all ones: within s is aKa, across a K (1 - a), within t the rest of 1K1
    product = chosen @ kernel
    within_s = (product * chosen).sum(1, dtype=np.float64)
    across = product.sum(1, dtype=np.float64) - within_s
    within_t = kernel.sum(dtype=np.float64) - within_s - 2 * across
    values = within_s / (n * (n - 1)) + within_t / (m * (m - 1)) - 2 * across / (n * m)
    p_value = (1 + int((values[1:] >= values[0] - 1e-12).sum())) / (permutations + 1)
    return Discrepancy(float(values[0]), p_value, bandwidth, permutations, n, m)


def output_shift(source_probs: Any, target_probs: Any) -> dict[str, float]:
    """Kolmogorov-Smirnov tests of a classifier's probabilities, class by class (Rabanser et al. 2019, "BBSDs").

    Sees a shift that the classifier feels, and no other. Source rows must be held out from its training.

    Returns:
        ``statistic``: the largest one; ``p_value``: the smallest one times the number of classes, at most 1.
    """
    from scipy.stats import ks_2samp

    source_probs, target_probs = _pair(source_probs, target_probs, 2)
    tests = [ks_2samp(source_probs[:, c], target_probs[:, c]) for c in range(source_probs.shape[1])]
    p_value = min(1.0, len(tests) * min(float(t.pvalue) for t in tests))
    return {"statistic": max(float(t.statistic) for t in tests), "p_value": p_value}


def match_prior(y: Any, prior: Any, seed: int = 0) -> np.ndarray:
    """Positions of rows, drawn without repetition, such that classes ``y`` ``[N]`` have the shares ``prior`` ``[C]``.

    A row of class c stays with probability ``w_c / max w``, where ``w_c = prior_c / share_c``.
    """
    y, prior = np.asarray(y), np.asarray(prior, dtype=np.float64)
    share = np.bincount(y, minlength=len(prior)) / len(y)
    weight = np.where(share > 0, prior / np.maximum(share, 1e-12), 0.0)
    return np.flatnonzero(np.random.default_rng(seed).random(len(y)) < weight[y] / weight.max())


def novelty(fit: Any, held_out: Any, target: Any, k: int = 5) -> dict[str, Any]:
    """Where target rows lie among held-out source rows by mean distance to the ``k`` nearest source rows.

    Distances are taken on at most 50 principal components. ``ranks`` are shares of the target by rank: 0.25 each in
    the first two where target rows are like source rows.

    Returns:
        ``ranks`` by interval; ``far``: share beyond the source's 95th percentile, less the 5 % expected; ``flat``:
        ratio of the first two shares (the second counts as 0.05 at least), 1 where a part of the target is like the
        source and the rest is far away, and below 1 where all of it moved.
    """
    fit, held_out = _pair(fit, held_out, 2)
    _, target = _pair(fit, target, 1)
    to = components(fit)
    base, k = to(fit), min(k, len(fit))

    def distance(rows: np.ndarray) -> np.ndarray:
        square = _square_distances(to(rows), base)
        return np.sqrt(np.partition(square, k - 1, axis=1)[:, :k]).mean(1)

    own = np.sort(distance(held_out))
    rank = np.searchsorted(own, distance(target)) / len(own)
    edges = [0, 0.25, 0.5, 0.75, 0.95]
    counts = np.histogram(rank, [*edges, 1.01])[0] / len(rank)
    names = [f"{a:g}-{b:g}" for a, b in zip(edges, [*edges[1:], 1], strict=True)]
    flat = float(counts[0] / max(counts[1], 0.05))
    return {
        "ranks": dict(zip(names, map(float, counts), strict=True)),
        "far": max(0.0, float(counts[-1]) - 0.05), "flat": flat,
    }  # fmt: skip


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column; 1 for a column that does not vary."""
    scale = x.std(0)
    return x.mean(0), np.where(scale < 1e-9 + 1e-6 * scale.max(initial=0.0), 1.0, scale)


def components(x: np.ndarray, most: int = 50) -> Any:
    """A function that standardises as ``x`` ``[N, F]`` and turns to its first principal components."""
    mean, scale = moments(x)
    if x.shape[1] <= most:
        return lambda rows: (rows - mean) / scale
    from sklearn.decomposition import PCA

    turn = PCA(min(most, *x.shape), random_state=0, svd_solver="randomized").fit((x - mean) / scale)
    return lambda rows: turn.transform((rows - mean) / scale)


def _square_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T, 0.0)


def _pair(source: Any, target: Any, least: int) -> tuple[np.ndarray, np.ndarray]:
    out = []
    for name, rows in (("first", source), ("second", target)):
        rows = np.asarray(rows, dtype=np.float64)
        if rows.ndim != 2 or len(rows) < least:
            raise UDAError(f"the {name} sample must be [N, F] with N of {least} or more, got {list(rows.shape)}.")
        out.append(rows)
    if out[0].shape[1] != out[1].shape[1]:
        raise UDAError(f"the samples have {out[0].shape[1]} and {out[1].shape[1]} features: they must have one width.")
    return out[0], out[1]
