"""How sure the model is, against how often it is right."""

from __future__ import annotations

import numpy as np

from uda.report import figures, measures
from uda.report.collect import Outcome, Run
from uda.report.html import Section, by_labels, note, paragraph
from uda.report.sections.base import NO_MODEL, Report, held_out, source_rows
from uda.report.style import SOURCE, TARGET, Plot


def section(report: Report) -> Section:
    """Reliability diagrams of source and target."""
    title = "Confidence"
    html = paragraph(
        "Reliability: how often predictions that were made with some confidence (from left to right) are right "
        "(height), in 15 bins with 95 % intervals; pale dots are bins of fewer than 5 images. Below the diagonal the "
        "model is too sure. ECE is the mean distance to the diagonal, weighted by the number of images; the lower "
        "panel has these numbers on a logarithmic scale."
    )
    parts = [reliability_of(report, i, run) for i, run in enumerate(report.runs)]
    return Section("confidence", title, html + report.grid(parts))


def reliability_of(report: Report, i: int, run: Run) -> str:
    """The diagram of one run."""
    if run.target is None:
        return note(f"{run.name}: {NO_MODEL}" if report.several else NO_MODEL)
    domains = [
        (o.name, measures.reliability(o.score[rows], o.correct[rows]), TARGET if o.is_target else SOURCE)
        for o in run.outcomes
        if (rows := judged(o)).any()
    ]
    caption = ["Source: held-out images."] if run.sources and held_out(run) else []
    caption += ["Source: training images, on which a model is too sure."] if run.sources and not held_out(run) else []
    if run.target.labelled:
        caption.append(f"Target: with its labels {by_labels()}.")
    else:
        caption.append("The target has no labels: its reliability is left out.")
    if (run.target.label >= run.target.probs.shape[1]).any():
        caption.append("Images that are rejected as unknown are left out.")
    words = " ".join(caption) + estimated_accuracy(run)
    if not domains:
        return paragraph(words, "note")
    told = ", ".join(f"{name} ECE {100 * r.ece:.1f} %" for name, r, _ in domains)
    return report.figure(Plot(
        report.slug("reliability", i), report.title(i), f"Reliability diagram: {told}.",
        lambda t: figures.reliability(t, domains), words,
    ))  # fmt: skip


def judged(o: Outcome) -> np.ndarray:
    """Rows whose confidence can be right or wrong: labelled, and not rejected as unknown."""
    return (o.y >= 0) & (o.label < o.probs.shape[1])


def ece(o: Outcome) -> float | None:
    """Expected calibration error of a domain."""
    rows = judged(o)
    return measures.reliability(o.score[rows], o.correct[rows]).ece if rows.any() else None


def estimated_accuracy(run: Run) -> str:
    """What the target's accuracy should be by its confidences alone."""
    from uda.shift.calibration import atc, doc

    if (rows := source_rows(run)) is None:
        return ""
    told = f"ATC {100 * atc(*rows, run.target.probs):.1f} %, DoC {100 * doc(*rows, run.target.probs):.1f} %"
    true = run.target.accuracy
    return f" Target accuracy as estimated without labels: {told}" + (
        "." if true is None else f"; it is {100 * true:.1f} % {by_labels()}."
    )
