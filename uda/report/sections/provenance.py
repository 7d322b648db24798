"""Where each run and the figures come from."""

from __future__ import annotations

from collections.abc import Callable

from uda.report.collect import Run
from uda.report.figures import run_color
from uda.report.html import Cell, Section, dot, oracle, paragraph, table, text
from uda.report.sections.base import RULES, Report


def section(report: Report) -> Section:
    """Where each run and the figures come from."""
    rows: list[tuple[str, Callable[[Run], str]]] = [
        ("directory", lambda r: f"<code>{text(r.path)}</code>"),
        ("started", lambda r: text(r.record.get("started", "unknown"))),
        ("command", lambda r: f"<code>{text(' '.join(r.record.get('argv', [])) or 'unknown')}</code>"),
        ("task", lambda r: text(r.task)),
        ("seed", lambda r: text(r.summary.get("seed"))),
        ("config hash", lambda r: f"<code>{text(r.summary.get('config_hash'))}</code>"),
        ("steps, epochs", lambda r: f"{r.summary['steps']:,}, {r.summary['epochs']:,}"),
        ("device", lambda r: f"{text(r.summary.get('device'))}, {r.summary.get('world_size', 1)} process(es), "
                             f"{r.summary.get('peak_memory_mib', 0):,.0f} MiB"),
        ("checkpoint evaluated", evaluated),
        ("versions", lambda r: text(", ".join(f"{k} {v}" for k, v in (r.summary.get("versions") or {}).items()))),
    ]  # fmt: skip
    dots = [dot(run_color(i)) if report.several else "" for i in range(len(report.runs))]
    head = [[Cell("what"), *(Cell(f"{d}{text(r.name)}") for d, r in zip(dots, report.runs, strict=True))]]
    body = [[Cell(text(name), head=True), *(Cell(value(r)) for r in report.runs)] for name, value in rows]
    html = table("Of each run", head, body)
    html += paragraph(
        "Results and curves are what the run itself wrote. Classes, features, confidence, shares and mistakes come "
        "from passing the evaluation images of each domain once more through the checkpoint named above."
    )
    return Section("provenance", "Where this comes from", html)


def evaluated(run: Run) -> str:
    """Which weights the figures of the model are of."""
    if run.checkpoint is None:
        return "none"
    tag = f" {oracle()}" if run.which == "oracle" else ""
    target = run.target
    got = "" if target is None or target.accuracy is None else f"; target accuracy {100 * target.accuracy:.1f} %"
    return f"<code>{text(run.checkpoint.name)}</code>, {RULES[run.which]}{tag}, step {run.checkpoint_step}{got}"
