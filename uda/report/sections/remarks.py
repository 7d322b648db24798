"""What stands out, in sentences, and how runs differ image by image."""

from __future__ import annotations

import numpy as np

from uda.report import measures
from uda.report.collect import Run
from uda.report.html import text
from uda.report.sections.base import Report, matrix_of
from uda.report.sections.confidence import ece


def remarks(report: Report) -> list[str]:
    """Sentences on what stands out, each from the numbers alone."""
    out = []
    for run in report.runs:
        found = remarks_on(run)
        if report.several and found:
            out.append(f"<strong>{text(run.name)}</strong>: {'; '.join(found)}.")
        else:
            out += [w[0].upper() + w[1:] + "." for w in found]
    out += [r for i in range(1, len(report.runs)) if (r := compared(report, i))]
    if report.several:
        words = "Each row is one run: a difference within the spread over seeds means nothing"
        out.append(f"{words} (<code>uda bench</code> runs several seeds).")
    return out


def remarks_on(run: Run) -> list[str]:
    """What stands out of one run."""
    out, s = [], run.summary[run.measures[0]]
    if s["selected"] is not None and s["oracle"] is not None:
        lost = 100 * (s["oracle"] - s["selected"])
        out.append(
            "the epoch that the label-free score takes is as good as the oracle's"
            if lost < 0.05
            else f"choosing the epoch without labels costs {lost:.1f} points against the oracle"
        )
    if collapsed := [r["epoch"] for r in run.history if r.get("select/collapsed") == 1]:
        out.append(f"predictions had collapsed in {len(collapsed)} of {len(run.history)} validations")
    if run.target is None or not run.target.labelled:
        return out
    names, matrix = run.names_with_unknown, matrix_of(run)
    accuracy = measures.class_accuracies(matrix)
    worst = int(np.nanargmin(accuracy))
    words = f"the weakest class is {text(names[worst])} ({100 * accuracy[worst]:.0f} %)"
    for t, p, n, _ in measures.confused_pairs(matrix, 1):
        words += f", the most frequent mistake {text(names[t])} taken for {text(names[p])} ({n} images)"
    out.append(words)
    if (error := ece(run.target)) is not None:
        source = next((x for o in run.sources if (x := ece(o)) is not None), None)
        ref = "" if source is None else f", on the source {100 * source:.1f}"
        out.append(f"calibration error (ECE) on the target is {100 * error:.1f} points{ref}")
    return out


def compared(report: Report, i: int) -> str | None:
    """What the i-th run gets right that the first does not, and the reverse, image by image."""
    a, b = report.runs[0].target, report.runs[i].target
    if a is None or b is None or not (a.labelled and b.labelled) or a.ids != b.ids or (a.y != b.y).any():
        return None
    fixed, broken = int((~a.correct & b.correct)[b.y >= 0].sum()), int((a.correct & ~b.correct)[b.y >= 0].sum())
    return (
        f"On the same {int((b.y >= 0).sum()):,} target images <strong>{text(report.runs[i].name)}</strong> gets "
        f"{fixed:,} right that <strong>{text(report.runs[0].name)}</strong> gets wrong, and {broken:,} wrong that it "
        "gets right."
    )
