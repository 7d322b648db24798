"""One table over several suites: which methods beat training on the source alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from uda.bench.statistics import TESTS, average_by_seed, by_task_and_seed, mean_and_spread, p_value
from uda.bench.tables import FIGURES, Table, in_order, told
from uda.errors import UDAError, nearest


def suites_table(
    data: pd.DataFrame,
    methods: Sequence[str] | None = None,
    figure: str = "last",
    baseline: str = "source_only",
    test: str = "wilcoxon",
    alpha: float = 0.05,
) -> Table:
    """Average accuracy in each suite and over the tasks of all, and the gain over a baseline; best first.

    The gain is the mean difference over (suite, task, seed) triples that both have; a task counts as won where
    the mean over its seeds is above the baseline's. The test pairs the tasks, each by its mean over seeds.

    Args:
        data: of :func:`uda.bench.tables.frame`, from the records of all suites.
        methods: to show; None: all.
        baseline: a method that every suite has.

    Raises:
        UDAError: unknown figure or baseline.
    """
    if figure not in FIGURES:
        raise UDAError(f"unknown figure {figure!r}. {nearest(figure, FIGURES)}")
    suites, methods = in_order(data["suite"], None), in_order(data["method"], methods)
    if baseline not in set(data["method"]):
        raise UDAError(f"no method {baseline!r} to compare with. {nearest(baseline, set(data['method']))}")
    data = data[data["method"].isin({*methods, baseline})]
    cells = data.pivot_table(index="method", columns=["suite", "task", "seed"], values=figure, aggfunc="last")
    tasks = {s: in_order(data[data["suite"] == s]["task"], None) for s in suites}
    averages = {}
    for suite in set(cells.columns.get_level_values("suite")):
        values = average_by_seed(by_task_and_seed(cells[suite], tasks[suite]))
        averages[suite] = dict(zip(cells.index, values, strict=True))
    whole = sum(map(len, tasks.values()))
    rows, numbers, marked = [], [], []
    for method in methods:
        own, row, number = cells.loc[method], [method], {"method": method}
        means = own.groupby(["suite", "task"]).mean().dropna()
        for suite in suites:
            mean, spread = mean_and_spread(averages[suite][method] if suite in averages else np.empty(0))
            row.append(told(mean, spread))
            number |= {suite: mean, f"{suite} sd": spread}
        overall = means.mean() if len(means) == whole else float("nan")
        both = pd.concat([own, cells.loc[baseline]], axis=1, keys=["own", "base"]).dropna()
        gain = (both["own"] - both["base"]).mean() if len(both) and method != baseline else float("nan")
        by_task = both.groupby(["suite", "task"]).mean()
        won = int((by_task["own"] > by_task["base"]).sum())
        # by task: the seeds of one are no independent pairs, and three of each would pass for three times the evidence
        sure = method != baseline and p_value(by_task["own"].to_numpy(), by_task["base"].to_numpy(), test) < alpha
        row += [told(overall, float("nan")), "" if np.isnan(gain) else f"{gain:+.1f}"]
        row.append("" if method == baseline else f"{won} of {len(by_task)}")
        rows.append(row)
        numbers.append({**number, "all tasks": overall, "gain": gain, "won": won, "of": len(by_task)})
        marked.append(sure)
    order = sorted(range(len(rows)), key=lambda i: _place(numbers[i]))
    head = ["method", *suites, "all tasks", "gain", "better on"]
    seeds = sorted(set(data["seed"]))
    caption = (
        f"Target accuracy in %: {_FIGURE[figure]}; mean ± standard deviation over seeds "
        f"({', '.join(map(str, seeds))}) of a suite's average, and the mean over all {whole} tasks (where a method ran "
        f"on all). Gain: over {baseline}, on the runs that both have; bold where it survives a {TESTS[test]} over "
        f"the tasks (means over seeds), alpha {alpha:g}, two-sided. Better on: tasks on which the mean over seeds is "
        f"above {baseline}."
    )
    bold = {(n, len(suites) + 2) for n, i in enumerate(order) if marked[i]}
    return Table(head, [rows[i] for i in order], caption, pd.DataFrame([numbers[i] for i in order]), bold)


_FIGURE = {
    "last": "last epoch (no selection)",
    "selected": "epoch selected without target labels",
    "oracle": "best epoch by target labels (oracle: an upper bound that no method may use)",
}


def _place(number: dict[str, float]) -> tuple[bool, float]:
    """By the mean over all tasks; methods that did not run on all come last, by their gain."""
    part = bool(np.isnan(number["all tasks"]))
    return part, -float(np.nan_to_num(number["gain" if part else "all tasks"]))
