"""The report as one HTML page, and its figures as files."""

from __future__ import annotations

import time
from pathlib import Path

import uda
from uda.report.html import page, text
from uda.report.sections import RULES, Report, all_sections, method
from uda.report.style import save


def render(report: Report) -> str:
    """The whole page: nothing in it refers to anything outside, and it needs no script."""
    first = report.runs[0]
    same_task = len({r.task for r in report.runs}) == 1
    if report.several:
        title = f"{first.task}: {len(report.runs)} runs" if same_task else f"{len(report.runs)} runs"
        lead = ", ".join(text(f"{r.name} ({method(r)})" if same_task else f"{r.name} ({r.task})") for r in report.runs)
    else:
        title = f"{first.task}: {method(first)}"
        lead = f"{text(first.name)}, seed {text(first.summary.get('seed'))}"
    if any(r.checkpoint for r in report.runs):
        rules = {RULES[r.which] for r in report.runs if r.checkpoint}
        lead += f" · model figures of the {text(', '.join(sorted(rules)))}"
    made = time.strftime("%Y-%m-%d %H:%M")
    return page(title, lead, all_sections(report), text(f"Made by uda {uda.__version__} on {made}."))


def figure_files(report: Report, folder: Path, kind: str) -> list[Path]:
    """Write each figure of a rendered report as ``folder/<name>.<kind>``."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for plot in report.plots:
        path = folder / f"{plot.name}.{kind}"
        path.write_bytes(save(plot, kind))
        out.append(path)
    return out
