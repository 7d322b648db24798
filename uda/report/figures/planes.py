"""Features of both domains in one plane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uda.report.style import RIGHT, SOURCE, TARGET, WRONG, Theme, new_figure


def class_colors(count: int) -> list[Any]:
    """Distinct colours up to 20 classes, then steps around the colour circle."""
    import matplotlib as mpl

    if count <= 10:
        return list(mpl.colormaps["tab10"].colors[:count])
    if count <= 20:
        return list(mpl.colormaps["tab20"].colors[:count])
    return list(mpl.colormaps["hsv"](np.linspace(0, 1, count, endpoint=False)))


def _plane(size: tuple[float, float] = (3.6, 3.9)) -> Any:
    figure, axes = new_figure(*size)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.margins(0.03)
    return figure, axes


def _legend(axes: Any, columns: int = 3) -> None:
    axes.legend(
        loc="upper left", bbox_to_anchor=(0, -0.01), ncols=columns, borderaxespad=0, handletextpad=0.2,
        columnspacing=0.9, scatterpoints=1,
    )  # fmt: skip


def _dots(axes: Any, xy: np.ndarray, label: str | None = None, **kwargs: Any) -> None:
    """Dots as one raster image in the SVG: thousands of vector dots would make the page slow."""
    axes.scatter(*xy.T, rasterized=True, linewidths=kwargs.pop("linewidths", 0), **kwargs)
    if label is not None:  # the legend's dot stays a vector, and stronger than those in the cloud
        axes.scatter([], [], label=label, **{**kwargs, "alpha": 1, "s": 24})


def embedding_domains(theme: Theme, xy: np.ndarray, is_target: np.ndarray, names: tuple[str, str]) -> Any:
    """Points ``[N, 2]`` by domain, drawn in mixed order so that none covers the other."""
    figure, axes = _plane()
    order = np.random.default_rng(0).permutation(len(xy))
    colors = np.where(is_target[order], TARGET, SOURCE)
    _dots(axes, xy[order], c=list(colors), s=8, alpha=0.65)
    for name, color, domain in ((names[0], SOURCE, "source"), (names[1], TARGET, "target")):
        axes.scatter([], [], color=color, s=24, label=f"{domain}: {name}")
    _legend(axes, 1 if sum(map(len, names)) > 30 else 2)
    return figure


def embedding_classes(
    theme: Theme, xy: np.ndarray, is_target: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> Any:
    """Points by class: sources as faint discs, the target as crosses."""
    figure, axes = _plane()
    colors = class_colors(len(names))
    point = np.array([colors[k] if k >= 0 else (0.5, 0.5, 0.5) for k in label])
    source, target = np.flatnonzero(~is_target), np.flatnonzero(is_target)
    _dots(axes, xy[source], c=point[source], s=18, alpha=0.35)
    _dots(axes, xy[target], c=point[target], s=11, alpha=0.9, marker="x", linewidths=0.8)
    if len(names) <= 20:
        for k, name in enumerate(names):
            axes.scatter([], [], color=[colors[k]], s=24, label=name)
    axes.scatter([], [], color=theme.muted, s=24, alpha=0.5, label="source")
    axes.scatter([], [], color=theme.muted, s=20, marker="x", linewidths=1, label="target")
    _legend(axes, 6 if max(map(len, names)) < 4 else 3 if max(map(len, names)) < 10 else 2)
    return figure


def embedding_errors(theme: Theme, xy: np.ndarray, is_target: np.ndarray, correct: np.ndarray) -> Any:
    """Target points, right and wrong, over the source in grey."""
    figure, axes = _plane()
    _dots(axes, xy[~is_target], "source", color=theme.muted, s=7, alpha=0.3)
    _dots(axes, xy[is_target & correct], "target, right", color=RIGHT, s=9, alpha=0.55)
    _dots(axes, xy[is_target & ~correct], "target, wrong", color=WRONG, s=13, alpha=0.95)
    _legend(axes)
    return figure
