"""Statistics behind the tables: averages by seed, spread, paired tests, rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from uda.errors import UDAError, nearest

TESTS = {"wilcoxon": "Wilcoxon signed-rank test", "t": "paired t-test"}


def average_by_seed(pairs: pd.Series, tasks: Sequence[str]) -> pd.Series:
    """Mean over ``tasks`` of each seed that has all of them; ``pairs`` is indexed by (task, seed)."""
    wide = pairs.unstack("seed").reindex(tasks)
    return wide.dropna(axis=1).mean(axis=0)


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
    return float(stats.wilcoxon(difference).pvalue)


def survives(values: pd.DataFrame, test: str, alpha: float) -> str | None:
    """The best method where its lead over the second survives a paired test, else None.

    Args:
        values: a row a method, a column a pair; a pair counts where all methods have it.
        test: of :data:`TESTS`.
        alpha: level.
    """
    values = values.dropna(axis=1)
    if len(values) < 2 or values.shape[1] == 0:
        return None
    ranked = values.mean(axis=1).sort_values(ascending=False, kind="stable").index
    best, second = values.loc[ranked[0]].to_numpy(), values.loc[ranked[1]].to_numpy()
    return ranked[0] if best.mean() > second.mean() and p_value(best, second, test) < alpha else None


def mean_and_spread(values: pd.Series) -> tuple[float, float]:
    """Mean and sample standard deviation (NaN for fewer than two values)."""
    values = values.dropna()
    return (float(values.mean()), float(values.std(ddof=1))) if len(values) else (float("nan"), float("nan"))


def spearman(a: pd.Series, b: pd.Series) -> float:
    """Rank correlation of two columns where both are finite; NaN for under 3 rows or a constant column."""
    both = pd.DataFrame({"a": a, "b": b}).replace([np.inf, -np.inf], np.nan).dropna()
    if len(both) < 3 or both["a"].nunique() < 2 or both["b"].nunique() < 2:
        return float("nan")
    return float(both["a"].rank().corr(both["b"].rank()))
