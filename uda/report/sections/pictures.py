"""Pictures that the run's own methods drew, such as what a memory holds."""

from __future__ import annotations

import base64
from pathlib import Path

from uda.report.collect import Run
from uda.report.html import Section, paragraph, text
from uda.report.sections.base import Report


def drawn(run: Run) -> list[Path]:
    """PNG files in folders of the run's directory, but for figures of a report."""
    return sorted(p for p in run.path.glob("*/*.png") if not p.parent.name.endswith("_figures"))


def section(report: Report) -> Section | None:
    """The pictures of each run, as they are; None where no run has any."""
    if not any(map(drawn, report.runs)):
        return None
    html = paragraph("What methods drew at the end of their run, by folder and file in the run's directory.")
    return Section("pictures", "Pictures of the method", html + report.each(lambda i, r: pictures_of(r)))


def pictures_of(run: Run) -> str:
    """Those of one run, inside the page."""
    out = ""
    for path in drawn(run):
        name = text(path.relative_to(run.path).as_posix())
        inside = base64.b64encode(path.read_bytes()).decode()
        image = f'<img src="data:image/png;base64,{inside}" alt="{name}" style="max-width:100%;background:#fff">'
        out += f'<figure><div class="t">{name}</div>{image}</figure>'
    return out or paragraph("None.")
