"""Predicted classes of the target against shares that are estimated without its labels."""

from __future__ import annotations

import numpy as np

from uda.errors import UDAError
from uda.report import figures
from uda.report.collect import Run
from uda.report.html import Section, by_labels, note, paragraph, text
from uda.report.sections.base import NO_MODEL, Report, source_rows
from uda.report.style import Plot


def section(report: Report) -> Section:
    """Predicted classes of the target against estimated shares."""
    html = paragraph(
        "How often each class is predicted on the target, against its share as estimated without target labels. BBSE "
        "corrects the predictions by the classifier's errors on source images, MLLS takes the shares that make the "
        "target's probabilities (calibrated on the source) most likely. Both assume that only the shares differ "
        "between the domains; a bar far from both marks tells of a class that is predicted too often or too rarely."
    )
    return Section("shares", "Class shares on the target", html + report.grid(
        shares_of(report, i, run) for i, run in enumerate(report.runs)
    ))  # fmt: skip


def estimated_priors(run: Run) -> tuple[dict[str, np.ndarray], list[str]]:
    """Class shares of the target by BBSE and MLLS, without target labels, and why one is missing."""
    from uda.shift.calibration import bcts, softmax
    from uda.shift.priors import bbse_prior, mlls_prior

    if (rows := source_rows(run)) is None:
        return {}, ["There is no source: its errors by class are unknown, so that no prior can be estimated."]
    probs, y = rows
    target = run.target.probs

    def mlls() -> np.ndarray:
        scores = [np.log(np.maximum(p.astype(np.float64), 1e-30)) for p in (probs, target)]  # logits but for a constant
        t, bias = bcts(scores[0], y)
        return mlls_prior(softmax(scores[1] / t + bias), run.source_prior)

    out, why = {}, []
    for name, make in (("BBSE", lambda: bbse_prior(probs, y, target)), ("MLLS", mlls)):
        try:
            out[name] = make()
        except UDAError as error:
            why.append(f"{name} is left out: {error}")
    return out, why


def shares_of(report: Report, i: int, run: Run) -> str:
    """The figure of one run."""
    if run.target is None:
        return note(f"{run.name}: {NO_MODEL}" if report.several else NO_MODEL)
    from uda.shift.priors import total_variation

    estimates, why = estimated_priors(run)
    names, size = run.names_with_unknown, len(run.names_with_unknown)
    wide = lambda p: np.pad(p, (0, size - len(p)))  # noqa: E731  no source estimate knows of the unknown
    predicted = np.bincount(run.target.label, minlength=size) / len(run.target.label)
    known = run.target.y[run.target.y >= 0]
    true = np.bincount(np.minimum(known, size - 1), minlength=size) / len(known) if len(known) else None
    source = None if run.source_prior is None else wide(run.source_prior)
    estimates = {k: wide(v) for k, v in estimates.items()}
    told = " and ".join(f"{100 * total_variation(predicted, v):.1f} % from {k}" for k, v in estimates.items())
    caption = f"Share of images that would have to change class: {told}" if told else ""
    if true is not None:
        off = f"{100 * total_variation(predicted, true):.1f} % from the true shares {by_labels()}"
        caption += f", {off}" if caption else f"Share of images that would have to change class: {off}"
    caption += "." if caption else ""
    caption += "".join(f" {text(w)}" for w in why)
    alt = "Predicted share of each class on the target: " + ", ".join(
        f"{n} {100 * p:.1f} %" for n, p in zip(names[:60], predicted, strict=False)
    )
    plot = Plot(
        report.slug("shares", i), report.title(i), alt,
        lambda t: figures.priors(t, names, predicted, estimates, source, true), caption,
    )  # fmt: skip
    return report.figure(plot)
