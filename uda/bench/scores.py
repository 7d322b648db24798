"""What label-free scores are worth, judged by target accuracy when the runs are over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from uda.bench.statistics import spearman
from uda.bench.tables import Table, in_order, seeds_told


def scores_over(frames: Sequence[pd.DataFrame]) -> Table:
    """:func:`scores_table` over the tasks of several ledgers, each task counting the same.

    Args:
        frames: of :func:`uda.bench.tables.frame`, one a ledger; tasks of one name in two of them are two tasks.
    """
    parts = [f.assign(task=f"{i} " + f["task"]) for i, f in enumerate(frames)]
    return scores_table(pd.concat(parts, ignore_index=True))


def scores_table(data: pd.DataFrame, tasks: Sequence[str] | None = None, methods: Sequence[str] | None = None) -> Table:
    """What each label-free score is worth, best first.

    Spearman's rank correlation, over the runs (methods and seeds) of a task, of the score at the last epoch
    with the target accuracy there: mean, least and greatest over tasks. Then the points of target accuracy lost
    against the oracle: by the epoch that the score takes in a run, and by the method that it takes for a task and
    seed (last epochs); means over runs, and over tasks and seeds.
    """
    tasks, methods = in_order(data["task"], tasks), in_order(data["method"], methods)
    data = data[data["task"].isin(tasks) & data["method"].isin(methods)]
    best = data.groupby(["task", "seed"])["last"].transform("max")
    rows, numbers = [], []
    for name in (c.removeprefix("score:") for c in data.columns if c.startswith("score:")):
        values = data[f"score:{name}"]
        found = {t: spearman(values[own.index], own["last"]) for t, own in data.groupby("task")}
        rho = np.array([v for v in found.values() if not np.isnan(v)])
        if not len(rho):
            continue
        taken = values.groupby([data["task"], data["seed"]]).idxmax().dropna()
        lost = (data["oracle"] - data[f"chosen:{name}"]).mean(), (best - data["last"])[taken].mean()
        correlations = [f"{v:+.2f}" for v in (rho.mean(), rho.min(), rho.max())]
        rows.append([name, *correlations, *(f"{v:.2f}" for v in (*lost, sum(lost)))])
        numbers.append({
            "score": name, "mean": rho.mean(), "least": rho.min(), "greatest": rho.max(),
            "lost, epoch": lost[0], "lost, method": lost[1],
            "lost, both": sum(lost),
        })  # fmt: skip
    order = sorted(range(len(rows)), key=lambda i: -numbers[i]["mean"])
    rows, numbers = [rows[i] for i in order], [numbers[i] for i in order]
    lost = (data["oracle"] - data["last"]).mean(), (best - data["last"]).mean()
    rows.append(["no score", "", "", "", *(f"{v:.2f}" for v in (*lost, sum(lost)))])
    numbers.append(
        {"score": "no score", "lost, epoch": lost[0], "lost, method": lost[1], "lost, both": sum(lost)}
    )
    caption = (
        "Label-free scores: Spearman's rank correlation of the score at the last epoch with target accuracy, "
        f"over the {len(methods)} methods x {seeds_told(data)} of a task (mean, least and greatest over "
        f"{len(tasks)} tasks); and the points of target accuracy lost against the oracle by the epoch that the score "
        "takes, by the method that it takes for a task and seed, and both together. No score: the last epoch, and a "
        "method drawn at random. Target labels judge the scores here, and chose nothing."
    )
    return Table(
        ["score", "correlation", "least", "greatest", "lost, epoch", "lost, method", "lost, both"], rows,
        caption, pd.DataFrame(numbers),
    )  # fmt: skip
