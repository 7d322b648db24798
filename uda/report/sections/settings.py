"""Differing settings of several runs, or the settings of one."""

from __future__ import annotations

from typing import Any

import yaml

from uda.report import measures
from uda.report.figures import run_color
from uda.report.html import Cell, Section, details, dot, note, paragraph, table, text
from uda.report.sections.base import Report


def section(report: Report) -> Section:
    """Differing settings of several runs, or the settings of one."""
    if report.several:
        rows = measures.differences([r.config for r in report.runs])
        head = [[Cell("setting"), *(Cell(f"{dot(run_color(i))}{text(r.name)}") for i, r in enumerate(report.runs))]]
        body = [[Cell(f"<code>{text(k)}</code>", head=True), *(Cell(plain(v)) for v in vs)] for k, vs in rows.items()]
        html = (
            table(f"{len(rows)} settings differ; a dash: the run has no such setting", head, body)
            if rows
            else note("All settings are the same.")
        )
    else:
        run = report.runs[0]
        plugins = (run.config.get("model") or {}).get("plugins") or {}
        body = []
        for key, plugin in plugins.items():
            plugin = plugin if isinstance(plugin, dict) else {"class_path": plugin}
            name = str(plugin.get("class_path")).rsplit(".", 1)[-1]
            told = ", ".join(f"{text(k)} = {plain(v)}" for k, v in (plugin.get("init_args") or {}).items())
            body.append([Cell(text(key), head=True), Cell(f"<code>{text(name)}</code>"), Cell(told)])
        head = [[Cell("key"), Cell("plugin"), Cell("arguments")]]
        html = table("Methods of the run", head, body) if body else paragraph("No plugin: trained on the source alone.")
    for run in report.runs:
        name = f"Complete config of {run.name}" if report.several else "Complete config"
        html += details(name, f"<pre>{text(yaml.safe_dump(run.config, sort_keys=False))}</pre>")
    return Section("settings", "Settings that differ" if report.several else "Settings", html)


def plain(value: Any) -> str:
    """A setting as text."""
    if value is ...:
        return '<span class="none">–</span>'
    shown = "null" if value is None else value if isinstance(value, str) else yaml.safe_dump(
        value, default_flow_style=True, width=10_000
    ).removesuffix("\n").removesuffix("\n...")  # fmt: skip
    return f"<code>{text(shown)}</code>"
