"""Curves over the training steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.report.style import RUNS, SOURCE, Theme, new_figure


@dataclass(frozen=True)
class Line:
    """A curve: label, points, colour, whether it is dashed, and points to mark as ``(x, y, marker)``."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: str = SOURCE
    dashed: bool = False
    marks: tuple[tuple[float, float, str], ...] = ()


def run_color(i: int) -> str:
    """Colour of the i-th run."""
    return RUNS[i % len(RUNS)]


def _thousands(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 10_000 else f"{v:g}"))


def curves(
    theme: Theme, lines: Sequence[Line], ylabel: str = "", title: str = "", size: tuple[float, float] = (6.6, 3.4),
    percent: bool = False, legend: bool = True,
) -> Any:  # fmt: skip
    """Lines over the training steps; a line of one point is a dot. ``percent``: values are fractions of 1."""
    figure, axes = new_figure(*size)
    scale = 100 if percent else 1
    for line in lines:
        style = (0, (4, 2)) if line.dashed else "-"
        dot = "o" if len(line.x) == 1 else None
        axes.plot(
            line.x, scale * np.asarray(line.y), color=line.color, linestyle=style, label=line.label, marker=dot,
            linewidth=1.3 if line.dashed else 1.8,
        )  # fmt: skip
    for line in lines:
        for x, y, marker in line.marks:
            big = {"*": 90, "D": 40}.get(marker, 32)
            axes.scatter(
                [x], [scale * y], marker=marker, s=big, color=line.color, edgecolor=theme.paper, linewidth=0.5, zorder=5
            )
    _thousands(axes.xaxis)
    axes.set(xlabel="training steps", ylabel=ylabel)
    axes.set_title(title)
    axes.margins(x=0.03, y=0.08)
    if legend and len(lines) > 0:
        figure.legend(loc="outside lower left", ncols=2, handlelength=2.2)
    return figure


def score_curve(
    theme: Theme, lines: Sequence[Line], title: str, behind: tuple[np.ndarray, np.ndarray] | None = None,
    legend: bool = False,
) -> Any:  # fmt: skip
    """A label-free score over the steps; ``behind``: the target accuracy as a thin dashed line on its own scale."""
    figure = curves(theme, lines, title=title, size=(3.5, 2.3), legend=legend)
    axes = figure.axes[0]
    if behind is not None and len(behind[0]):
        other = axes.twinx()
        other.plot(behind[0], 100 * behind[1], color=theme.muted, linestyle=(0, (2, 2)), linewidth=1)
        other.grid(False)
        other.set_zorder(0)
        axes.set_zorder(1)
        other.tick_params(right=True, labelsize=7)
    return figure
