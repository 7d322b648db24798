"""Statistics behind the tables: averages by seed, spread, paired tests, rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from uda.errors import UDAError, nearest

TESTS = {"wilcoxon": "Wilcoxon signed-rank test", "t": "paired t-test"}


def by_task_and_seed(pairs: pd.DataFrame, tasks: Sequence[str]) -> np.ndarray:
    """Figures as an array ``[methods, tasks, seeds]``, NaN where there is none.

    Args:
        pairs: a row a method, a column a (task, seed).
        tasks: in the order wanted.
    """
    seeds = sorted(set(pairs.columns.get_level_values("seed")))
    wide = pairs.reindex(columns=pd.MultiIndex.from_product([list(tasks), seeds], names=["task", "seed"]))
    return wide.to_numpy(float).reshape(len(pairs), len(tasks), len(seeds))


def average_by_seed(values: np.ndarray) -> np.ndarray:
    """Mean over tasks ``[..., tasks, seeds] -> [..., seeds]`` of each seed that has all of them, else NaN."""
    return values.sum(-2) / values.shape[-2]


def p_value(a: np.ndarray, b: np.ndarray, test: str = "wilcoxon") -> float:
    """Two-sided p-value of paired differences, ``[n]`` each; 1 where all are zero or there is one pair."""
    from scipy import stats

    if test not in TESTS:
        raise UDAError(f"unknown test {test!r}. {nearest(test, TESTS)}")
    difference = np.asarray(a, float) - np.asarray(b, float)
    if len(difference) < 2 or not np.any(difference):
        return 1.0
    if test == "t":
        if np.ptp(difference) == 0:  # the same gain in each pair: no spread to test against
            return 0.0
        return float(stats.ttest_1samp(difference, 0.0).pvalue)
    size = np.abs(difference)
    if len(size) <= 13 and (not size.all() or len(np.unique(size)) < len(size)):
        return _signed_ranks(difference[size > 0])
    return float(stats.wilcoxon(difference).pvalue)


def _signed_ranks(difference: np.ndarray) -> float:
    """Exact two-sided p-value of the signed-rank statistic with ties: all signs are equally likely.

    ``scipy.stats.wilcoxon`` gives this number in that case from up to 2^13 samples that it ranks one by one; the
    distribution of a sum of given ranks follows from adding them one at a time.
    """
    from scipy.stats import rankdata

    ranks = np.round(2 * rankdata(np.abs(difference))).astype(int)  # twice, as ranks of ties may end in a half
    ways = np.zeros(ranks.sum() + 1)
    ways[0] = 1
    for rank in ranks:
        ways[rank:] += ways[:-rank].copy()
    found = ranks[difference > 0].sum()
    return float(min(1.0, 2 * min(ways[: found + 1].sum(), ways[found:].sum()) / ways.sum()))


def survives(values: pd.DataFrame, test: str, alpha: float) -> str | None:
    """The best method where its lead over the second survives a paired test, else None.

    Args:
        values: a row a method, a column a pair; a pair counts where all methods have it.
        test: of :data:`TESTS`.
        alpha: level.
    """
    figures = values.to_numpy(float)
    figures = figures[:, ~np.isnan(figures).any(0)]
    if len(figures) < 2 or figures.shape[1] == 0:
        return None
    first, next_ = np.argsort(-figures.mean(1), kind="stable")[:2]
    best, second = figures[first], figures[next_]
    return values.index[first] if best.mean() > second.mean() and p_value(best, second, test) < alpha else None


def mean_and_spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and sample standard deviation of the values that are there (NaN for none; for fewer than two)."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Rank correlation of two columns where both are finite; NaN for under 3 rows or a constant column."""
    from scipy.stats import rankdata

    both = np.stack([a.to_numpy(float), b.to_numpy(float)])
    both = both[:, np.isfinite(both).all(0)]
    if both.shape[1] < 3 or (np.ptp(both, axis=1) == 0).any():
        return float("nan")
    return float(np.corrcoef(rankdata(both, axis=1))[0, 1])
