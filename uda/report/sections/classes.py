"""Which classes are right, and what they are taken for."""

from __future__ import annotations

import math

from uda.report import figures, measures
from uda.report.collect import Run
from uda.report.figures import run_color
from uda.report.html import Cell, Section, by_labels, details, note, paragraph, table, text
from uda.report.sections.base import Report, lacking, matrix_of
from uda.report.style import TARGET, Plot
from uda.run.figures import percent


def section(report: Report) -> Section:
    """Confusion matrices and accuracy of each class."""
    title = "Classes"
    reasons = [lacking(r) for r in report.runs]
    if all(reasons):
        return Section("classes", title, note(reasons[0]))
    html = paragraph(f"On the target's evaluation images, with their labels {by_labels()}.")
    shown = [(i, r) for i, r in enumerate(report.runs) if not reasons[i]]
    html += "".join(note(f"{r.name}: {reasons[i]}") for i, r in enumerate(report.runs) if reasons[i])
    parts = [confusion_figure(report, i, r) for i, r in shown]
    if all(r.names_with_unknown == shown[0][1].names_with_unknown for _, r in shown):
        together = [i for i, _ in shown]
        bars = class_figure(report, together)
        html += report.grid([*parts, bars]) if len(shown) == 1 else report.grid(parts) + bars
        html += class_table(report, together)
    else:
        html += report.grid([*parts, *(class_figure(report, [i]) for i, _ in shown)])
    return Section("classes", title, html + "".join(pairs_table(report, i, r) for i, r in shown))


def confusion_figure(report: Report, i: int, run: Run) -> str:
    """Confusion matrix of one run."""
    matrix, names = matrix_of(run), run.names_with_unknown
    accuracy = matrix.diagonal().sum() / matrix.sum()
    pairs = measures.confused_pairs(matrix, 3)
    told = ", ".join(f"{names[t]} as {names[p]} ({n})" for t, p, n, _ in pairs) or "none"
    alt = f"Confusion matrix of {len(names)} classes, {100 * accuracy:.1f} % on the diagonal; largest mistakes: {told}."
    caption = "Percent of each true class (row); rows add up to 100."
    title = report.title(i) or "Confusion matrix"
    return report.figure(
        Plot(report.slug("confusion", i), title, alt, lambda t: figures.confusion(t, matrix, names), caption)
    )


def class_figure(report: Report, which: list[int]) -> str:
    """Accuracy of each class, of several runs together."""
    runs = [report.runs[i] for i in which]
    matrices, names = [matrix_of(r) for r in runs], runs[0].names_with_unknown
    accuracy = measures.class_accuracies(matrices[0])
    order = figures.shown_classes(accuracy)
    alt = "Accuracy of each class: " + ", ".join(
        f"{names[k]} {' / '.join(f'{100 * measures.class_accuracies(m)[k]:.0f}' for m in matrices)} %" for k in order
    )
    many = len(names) > figures.MANY
    first = f" of {text(runs[0].name)}" if len(runs) > 1 else ""
    caption = f"Weakest class{first} first; number of images in brackets."
    caption += f" Of {len(names)} classes the {figures.MANY // 2} weakest and strongest." if many else ""
    labels, colors = [r.name for r in runs], [run_color(i) if report.several else TARGET for i in which]
    draw = lambda t: figures.class_accuracy(t, matrices, names, labels, colors)  # noqa: E731
    return report.figure(Plot(report.slug("classes", which[0]), "Accuracy of each class", alt, draw, caption))


def class_table(report: Report, which: list[int]) -> str:
    """The numbers behind the figure."""
    runs = [report.runs[i] for i in which]
    matrices, names = [matrix_of(r) for r in runs], runs[0].names_with_unknown
    columns = [text(r.name) for r in runs] if report.several else ["accuracy, %"]
    head = [[Cell("class"), Cell("images", "n"), *(Cell(name, "n") for name in columns)]]
    body = [
        [
            Cell(text(name), head=True), Cell(f"{matrices[0][k].sum():,}", "n"),
            *(Cell(percent(rounded(measures.class_accuracies(m)[k])), "n") for m in matrices),
        ]
        for k, name in enumerate(names)
    ]  # fmt: skip
    return details("Values", table("Accuracy of each class on the target, %", head, body))


def rounded(value: float) -> float | None:
    """None for NaN."""
    return float(value) if math.isfinite(value) else None


def pairs_table(report: Report, i: int, run: Run) -> str:
    """The most frequent mistakes."""
    names, pairs = run.names_with_unknown, measures.confused_pairs(matrix_of(run), 10)
    if not pairs:
        return note(f"{run.name}: no mistake on the target.")
    head = [[Cell("true class"), Cell("predicted"), Cell("images", "n"), Cell("of the class, %", "n")]]
    body = [
        [Cell(text(names[t]), head=True), Cell(text(names[p])), Cell(f"{n:,}", "n"), Cell(f"{100 * s:.1f}", "n")]
        for t, p, n, s in pairs
    ]
    name = f"Most frequent mistakes of {run.name}" if report.several else "Most frequent mistakes"
    return details(name, table("Pairs of classes, most frequent first", head, body))
