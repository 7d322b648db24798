"""Accuracies, objectives and label-free scores over the steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from uda.report import figures, measures
from uda.report.collect import Run
from uda.report.figures import Line, run_color
from uda.report.html import Cell, Section, by_labels, details, dot, note, oracle, paragraph, table, text
from uda.report.sections.base import Report
from uda.report.style import PRINT, SOURCE, TARGET, Plot


def section(report: Report) -> Section:
    """Accuracies, objectives and label-free scores over the steps."""
    html = paragraph("Over the steps of the optimiser. Accuracies and scores are taken in each validation.")
    if not any(r.history for r in report.runs):
        return Section("curves", "Learning curves", note("The runs kept no history: there is nothing to draw."))
    html += accuracy_figure(report)
    html += "<h3>Objectives</h3>" + objectives(report) + "<h3>Label-free scores</h3>" + scores(report)
    return Section("curves", "Learning curves", html)


def accuracy_figure(report: Report) -> str:
    """Target and source accuracy over the steps, with the epochs that the rules take."""
    lines = []
    for i, run in enumerate(report.runs):
        x, y = run.series(run.headline)
        if len(x):
            marks = tuple(
                (row["step"], row[run.headline], mark)
                for rule, mark in (("last", "o"), ("selected", "D"), ("oracle", "*"))
                if (row := run.row_of(rule)) is not None and math.isfinite(row.get(run.headline, math.nan))
            )
            name = f"{run.name}, target" if report.several else "target"
            lines.append(Line(name, x, y, run_color(i) if report.several else TARGET, False, marks))
        x, y = run.series(run.source_headline)
        if len(x):
            name = f"{run.name}, source" if report.several else "source"
            lines.append(Line(name, x, y, run_color(i) if report.several else SOURCE, True))
    if not lines:
        return note("No accuracy was measured: the run has neither a source nor target labels.")
    word = report.runs[0].word
    target = any(not line.dashed for line in lines)
    caption = "Dashed: source. " + (
        f"Solid: target {by_labels()}. ● last epoch, ◆ selected without labels, ★ {oracle()}."
        if target
        else "There is no curve of the target, which has no labels."
    )
    end = "; ".join(f"{ln.label} ends at {100 * ln.y[-1]:.1f} %" for ln in lines)
    plot = Plot(
        "accuracy", word.capitalize(), f"{word.capitalize()} in percent over training steps: {end}.",
        lambda t: figures.curves(t, lines, f"{word}, %", percent=True, size=(10.4, 4.0)), caption,
    )  # fmt: skip
    return report.figure(plot) + history_table(report)


def history_table(report: Report) -> str:
    """The numbers behind the curves."""
    out = ""
    for run in report.runs:
        keys = [run.source_headline, run.headline, f"select/{run.summary['selection']['score']}"]
        keys = [k for k in keys if any(k in r for r in run.history)]
        head = [[Cell("epoch"), Cell("step", "n"), *(Cell(text(k), "n") for k in keys)]]
        body = [
            [
                Cell(str(r["epoch"]), head=True), Cell(str(r["step"]), "n"),
                *(Cell(f"{r.get(k, math.nan):.4f}", "n") for k in keys),
            ]
            for r in run.history
        ]  # fmt: skip
        name = f"Values of {run.name}" if report.several else "Values"
        out += details(name, table(text("One row a validation"), head, body))
    return out


def objectives(report: Report) -> str:
    """A small figure for each objective and diagnostic."""
    names = list(dict.fromkeys(n for r in report.runs for n in r.objectives))
    if not names:
        return note("No objective was logged: see trainer.log_every_n_steps.")
    names = sorted(names, key=lambda n: (n == "loss", "/" in n, n))
    out = []
    for name in names:
        lines = [
            Line(run.name, *run.objectives[name], run_color(i))
            for i, run in enumerate(report.runs)
            if name in run.objectives
        ]
        title = "sum of the objectives" if name == "loss" else name
        out.append(report.figure(Plot(f"objective-{name}", text(title), trend(title, lines), small(lines))))
    words = "Objectives and diagnostics by plugin key, at the steps that were logged (trainer.log_every_n_steps)."
    if any(not (r.path / "logs" / "metrics.csv").is_file() for r in report.runs):
        words += " Where there is no metrics.csv, a point is the mean of the logged steps before a validation."
    return paragraph(text(words)) + colour_key(report) + report.grid(out, "small")


def colour_key(report: Report) -> str:
    """Which colour is which run."""
    names = (f"{dot(run_color(i))}{text(r.name)}" for i, r in enumerate(report.runs))
    return paragraph(" &nbsp; ".join(names)) if report.several else ""


def small(lines: list[Line]) -> Callable[[Any], Any]:
    """A small multiple, with lines bound now."""
    return lambda t: figures.curves(t, lines, size=(3.5, 2.2), legend=t is PRINT and len(lines) > 1)


def trend(name: str, lines: Sequence[Line]) -> str:
    """Alternative text of curves."""
    ends = "; ".join(f"{ln.label} from {ln.y[0]:.3g} to {ln.y[-1]:.3g}" for ln in lines if len(ln.y))
    return f"{name} over training steps: {ends}."


def scores(report: Report) -> str:
    """A small figure for each label-free score, with the target accuracy behind it."""
    names = dict.fromkeys(
        k for r in report.runs for row in r.history for k in row if k.startswith("select/") and k != "select/collapsed"
    )
    if not names:
        return note("No label-free score was computed.")
    out = []
    for key in names:
        name, lines, told = key.removeprefix("select/"), [], []
        for i, run in enumerate(report.runs):
            x, y = run.series(key)
            if not len(x):
                continue
            lines.append(Line(run.name, x, y, run_color(i), False, taken(run, name)))
            pairs = [(r.get(key, math.nan), r.get(run.headline, math.nan)) for r in run.history]
            if (rho := measures.rank_correlation(*np.array(pairs, float).T)) is not None:
                told.append(f"{dot(run_color(i)) if report.several else ''}{rho:+.2f}")
        behind = report.runs[0].series(report.runs[0].headline) if not report.several else None
        caption = f"Rank correlation with target {report.runs[0].word} {by_labels()}: {', '.join(told)}" if told else ""
        title = f"{name} (selects)" if name in {r.summary["selection"]["score"] for r in report.runs} else name
        draw = lambda t, ls=lines, b=behind: figures.score_curve(t, ls, "", b, t is PRINT and len(ls) > 1)  # noqa: E731
        out.append(report.figure(Plot(f"score-{name}", text(title), trend(f"score {name}", lines), draw, caption)))
    words = "Larger is better for all of them. ◆ is the epoch that the score would take alone."
    if not report.several and len(report.runs[0].series(report.runs[0].headline)[0]):
        what = f"target {report.runs[0].word}"
        words += f" The thin dashed line and the right scale are the {what} in percent, for comparison only."
    return paragraph(words) + colour_key(report) + report.grid(out, "small")


def taken(run: Run, score: str) -> tuple[tuple[float, float, str], ...]:
    """The validation that a score would take, as a mark; none that had collapsed."""
    from uda.selection import select_epoch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        at = select_epoch(run.history, score)
    return () if at is None else ((run.history[at]["step"], run.history[at][f"select/{score}"], "D"),)
