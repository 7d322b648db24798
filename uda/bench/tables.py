"""From ledger records to tables: means over seeds, the three figures, and the worth of the scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from uda.bench.ledger import latest
from uda.bench.statistics import TESTS, average_by_seed, by_task_and_seed, mean_and_spread, survives
from uda.errors import UDAError, nearest
from uda.metrics.names import MEASURES

FIGURES = ("last", "selected", "oracle")
AVERAGE = "average"


@dataclass
class Table:
    """A table ready to be printed.

    Attributes:
        head: names of the columns, the first of which names the rows.
        rows: texts.
        numbers: the same as numbers, for csv: columns and rows.
        bold: cells (row, column) that are marked.
        caption: what the figures are, how they were chosen, and what the mark means.
    """

    head: list[str]
    rows: list[list[str]]
    caption: str
    numbers: pd.DataFrame
    bold: set[tuple[int, int]] = field(default_factory=set)


def frame(records: Iterable[Mapping[str, Any]], measure: str = "target_accuracy") -> pd.DataFrame:
    """Finished records as a data frame, the last of each (suite, task, method, seed).

    Columns: ``suite``, ``task``, ``method``, ``seed``, ``select_by``, ``seconds``, ``memory``, ``source``,
    then ``last``, ``selected``, ``oracle`` of ``measure`` in percent, and ``score:<name>`` and
    ``chosen:<name>`` of each label-free score (its value at the last validation; the accuracy in percent of
    the validation that it would take).

    Raises:
        UDAError: nothing is finished.
    """
    rows = []
    for r in latest(records):
        figures = (r["metrics"] or {}).get(measure) or {}
        row = {k: r.get(k) for k in ("suite", "task", "method", "seed", "select_by", "seconds")}
        row |= {"memory": r.get("peak_memory_mib"), "source": _percent(r["metrics"].get("source_accuracy"))}
        row |= {which: _percent(figures.get(which)) for which in FIGURES}
        for name, score in (r.get("scores") or {}).items():
            row[f"score:{name}"] = _number(score.get("last"))
            row[f"chosen:{name}"] = _percent(score.get("target_accuracy"))
        rows.append(row)
    if not rows:
        raise UDAError("The ledger has no finished run: `uda bench run SUITE` first.")
    return pd.DataFrame(rows)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _percent(value: Any) -> float:
    return 100 * _number(value)


def in_order(found: Iterable[str], wanted: Sequence[str] | None) -> list[str]:
    """Names that occur, in the suite's order where there is one, else in order of appearance."""
    names = list(dict.fromkeys(found))
    return names if wanted is None else [n for n in wanted if n in names]


def pick(names: list[str], only: Sequence[str] | None, what: str) -> list[str]:
    """The names that were asked for, in the order asked.

    Raises:
        UDAError: an unknown one.
    """
    for name in only or ():
        if name not in names:
            raise UDAError(f"no {what} {name!r} in the ledger. {nearest(name, names)}")
    return list(only) if only else names


def cells(data: pd.DataFrame, figure: str) -> pd.DataFrame:
    """``figure`` with a row for each method and a column for each (task, seed) pair."""
    return data.pivot_table(index="method", columns=["task", "seed"], values=figure, aggfunc="last")


def told(mean: float, spread: float) -> str:
    """``52.3 ± 0.8``."""
    if np.isnan(mean):
        return "-"
    return f"{mean:.1f}" if np.isnan(spread) else f"{mean:.1f} ± {spread:.1f}"


def accuracy_table(
    data: pd.DataFrame,
    figure: str = "last",
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    test: str = "wilcoxon",
    alpha: float = 0.05,
    measure: str = "target_accuracy",
) -> Table:
    """Mean and spread over seeds: a row a method, a column a task, and the average over tasks.

    The best of a column is marked where its lead over the second survives the test over (task, seed) pairs;
    in the column of one task these are its seeds alone.
    """
    if figure not in FIGURES:
        raise UDAError(f"unknown figure {figure!r}. {nearest(figure, FIGURES)}")
    tasks, methods = in_order(data["task"], tasks), in_order(data["method"], methods)
    data = data[data["task"].isin(tasks) & data["method"].isin(methods)]
    pairs = cells(data, figure).reindex(methods)
    values = by_task_and_seed(pairs, tasks)
    columns = dict(zip(tasks, np.moveaxis(values, 1, 0), strict=True))  # task: [methods, seeds]
    if len(tasks) > 1:
        columns[AVERAGE] = average_by_seed(values)
    rows, numbers, bold = [], [], set()
    for i, method in enumerate(methods):
        row, number = [method], {"method": method}
        for task, column in columns.items():
            mean, spread = mean_and_spread(column[i])
            row.append(told(mean, spread))
            number |= {task: mean, f"{task} sd": spread, f"{task} n": int((~np.isnan(column[i])).sum())}
        rows.append(row)
        numbers.append(number)
    head = ["method", *columns]
    for column, task in enumerate(columns, 1):
        of_column = pairs if task == AVERAGE else pd.DataFrame(columns[task], index=methods)
        if (best := survives(of_column, test, alpha)) is not None:
            bold.add((methods.index(best), column))
    caption = (
        f"{MEASURES[measure]} in %, {_figure(data, figure)}; {_spread(data)}"
        f"{_gaps(pairs)}. Bold: the best of a column where its lead over the second survives a {TESTS[test]} "
        f"over (task, seed) pairs, alpha {alpha:g}, two-sided."
    )
    return Table(head, rows, caption, pd.DataFrame(numbers), bold)


def headline_of(records: Iterable[Mapping[str, Any]]) -> str:
    """The measure that stands for these runs: that of their setting.

    Raises:
        UDAError: runs of settings with different ones.
    """
    found = {r.get("headline", "target_accuracy") for r in latest(records)}
    if len(found) > 1:
        raise UDAError(f"the ledger has runs of several settings: name one of {', '.join(sorted(found))} as --measure")
    return found.pop() if found else "target_accuracy"


def _figure(data: pd.DataFrame, figure: str) -> str:
    rules = ", ".join(sorted(set(data["select_by"].dropna())))
    return {
        "last": "last epoch (no selection)",
        "selected": f"epoch selected without target labels (rule: {rules})",
        "oracle": "best epoch by target labels (oracle: an upper bound that no method may use)",
    }[figure]


def seeds_told(data: pd.DataFrame) -> str:
    """How many seeds, or which one."""
    seeds = sorted(set(data["seed"]))
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds"


def _spread(data: pd.DataFrame) -> str:
    if data["seed"].nunique() == 1:
        return f"{seeds_told(data)} alone, so no spread"
    return f"mean ± standard deviation over {seeds_told(data)}"


def _gaps(pairs: pd.DataFrame) -> str:
    missing = int(pairs.isna().sum().sum())
    return f" ({missing} of {pairs.size} runs are missing, or had no epoch to select)" if missing else ""


def figures_table(
    data: pd.DataFrame,
    tasks: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    measure: str = "target_accuracy",
) -> Table:
    """The three figures side by side, averaged over tasks, with source accuracy, time and memory of a run."""
    tasks, methods = in_order(data["task"], tasks), in_order(data["method"], methods)
    data = data[data["task"].isin(tasks) & data["method"].isin(methods)]
    rows, numbers = [], []
    found = {}
    for figure in FIGURES:
        if data[figure].notna().any():
            found[figure] = average_by_seed(by_task_and_seed(cells(data, figure).reindex(methods), tasks))
    for i, method in enumerate(methods):
        own = data[data["method"] == method]
        row, number = [method], {"method": method}
        for figure in FIGURES:
            mean, spread = mean_and_spread(found[figure][i] if figure in found else np.empty(0))
            row.append(told(mean, spread))
            number |= {figure: mean, f"{figure} sd": spread}
        source, seconds, memory = own["source"].mean(), own["seconds"].median(), own["memory"].max()
        row += [told(source, float("nan")), _plain(seconds, 1), _plain(memory, 0)]
        numbers.append({**number, "source": source, "seconds": seconds, "peak MiB": memory})
        rows.append(row)
    rules = ", ".join(sorted(set(data["select_by"].dropna())))
    plural = "s" * (len(tasks) > 1)
    caption = (
        f"{MEASURES[measure]} in %, average over {len(tasks)} task{plural}; {_spread(data)}. "
        f"Last: last epoch. Selected: by the label-free score {rules}. Oracle: best epoch by "
        "target labels. Source: accuracy on held-back source data. Seconds: median training time of a run; "
        "MiB: largest peak memory."
    )
    return Table(["method", *FIGURES, "source", "seconds", "MiB"], rows, caption, pd.DataFrame(numbers))


def _plain(value: float, digits: int) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"
