"""The figures of a report: each function draws arrays on a new Matplotlib figure and does nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.report.measures import Reliability, class_accuracies
from uda.report.style import RIGHT, RUNS, SOURCE, TARGET, WRONG, Theme, new_figure

MANY = 40  # classes from which on a figure shows the extremes alone
FEW = 5  # samples of a bin below which its accuracy says nothing
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


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


# -------------------------------------------------------------------------------------------- mistakes


def confusion(theme: Theme, counts: np.ndarray, names: Sequence[str]) -> Any:
    """Shares of each true class (row) over predictions (column); numbers in the cells up to 15 classes."""
    from matplotlib.colors import LinearSegmentedColormap

    c = len(names)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(1.9 + 0.33 * c, 3.6, 6.6))
    figure, axes = new_figure(side, side)
    shades = LinearSegmentedColormap.from_list("share", [(0.23, 0.49, 0.85, 0.0), (0.16, 0.40, 0.78, 1.0)])
    shown = np.ma.masked_equal(share, 0)
    axes.pcolormesh(
        np.arange(c + 1) - 0.5, np.arange(c + 1) - 0.5, shown, cmap=shades, vmin=0, vmax=1, rasterized=c > 30,
        linewidth=0, antialiased=False,
    )  # fmt: skip
    if c <= 15:
        for i, j in zip(*np.nonzero(counts), strict=True):
            color = "#ffffff" if share[i, j] > 0.55 else theme.ink
            text = f"{100 * share[i, j]:.0f}" if share[i, j] >= 0.005 else "·"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlim=(-0.5, c - 0.5), ylim=(c - 0.5, -0.5), xlabel="predicted class", ylabel="true class")
    axes.set_aspect("equal")
    axes.grid(False)
    for side_ in ("top", "right"):
        axes.spines[side_].set_visible(True)
    if c <= MANY:
        long = max(map(len, names)) > 2
        axes.set_xticks(range(c), names, rotation=90 if long else 0)
        axes.set_yticks(range(c), names)
        axes.tick_params(length=0, labelsize=8 if c <= 20 else 6.5)
    else:
        axes.tick_params(labelsize=7)
    return figure


def shown_classes(values: np.ndarray, many: int = MANY) -> np.ndarray:
    """Positions of classes to show, lowest value first; of more than ``many`` the extremes at both ends."""
    order = np.argsort(np.where(np.isfinite(values), values, np.inf), kind="stable")
    order = order[np.isfinite(values[order])]
    return order if len(order) <= many else np.concatenate([order[: many // 2], order[-many // 2 :]])


def class_accuracy(
    theme: Theme, counts: Sequence[np.ndarray], names: Sequence[str], labels: Sequence[str], colors: Sequence[str]
) -> Any:
    """Accuracy of each class: a bar for one run, a dot a run and a line between them for several.

    Args:
        theme: of the figure.
        counts: confusion matrix ``[C, C]`` of each run.
        names: of the classes.
        labels, colors: of the runs.
    """
    table = np.array([class_accuracies(m) for m in counts])
    support = counts[0].sum(1)
    order = shown_classes(table[0])
    figure, axes = new_figure(5.2 if len(counts) == 1 else 6.6, 0.95 + 0.235 * len(order) + 0.2 * (len(counts) > 1))
    at = np.arange(len(order))
    if len(counts) == 1:
        axes.barh(at, 100 * table[0, order], color=colors[0], height=0.66)
        for i, k in zip(at, order, strict=True):
            axes.text(101, i, f"{100 * table[0, k]:.0f}", va="center", fontsize=7.5, color=theme.muted)
    else:
        low, high = 100 * np.nanmin(table[:, order], 0), 100 * np.nanmax(table[:, order], 0)
        axes.hlines(at, low, high, color=theme.grid, linewidth=3)
        for i, row in enumerate(table):
            axes.scatter(
                100 * row[order], at, color=colors[i], marker=_MARKS[i % 8], s=34, label=labels[i], zorder=3 + i,
                edgecolor=theme.paper, linewidth=0.6,
            )  # fmt: skip
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=min(3, len(labels)), borderaxespad=0.2)
    axes.set_yticks(at, [f"{names[k]}  ({support[k]:,})" for k in order])
    axes.set(xlim=(0, 107 if len(counts) == 1 else 102), ylim=(len(order) - 0.4, -0.6), xlabel="accuracy, %")
    axes.set_xticks(range(0, 101, 20))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return figure


def gallery(theme: Theme, images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 6) -> Any:
    """Pictures with a caption each, in rows."""
    rows = -(-len(images) // columns)
    figure, axes = new_figure(1.35 * columns, 1.75 * rows, nrows=rows, ncols=columns, squeeze=False)
    for i, place in enumerate(axes.flat):
        place.axis("off")
        if i < len(images):
            place.imshow(images[i], interpolation="nearest" if max(images[i].shape) < 64 else "antialiased")
            place.set_title(captions[i], fontsize=7, loc="center", fontweight="normal")
    return figure


# ------------------------------------------------------------------------------------------- embedding


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


# -------------------------------------------------------------------------------- confidence and priors


def wilson(share: np.ndarray, count: np.ndarray, z: float = 1.96) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of a share by Wilson's formula: low and high, for each of ``count`` trials."""
    count = np.maximum(count, 1)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z * np.sqrt(share * (1 - share) / count + z**2 / (4 * count**2)) / (1 + z**2 / count)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def reliability(theme: Theme, parts: Sequence[tuple[str, Reliability, str]]) -> Any:
    """Accuracy over confidence of several domains (label, bins, colour), and below how many samples lie where.

    Bars are 95 % intervals of each bin's accuracy; a bin of fewer than :data:`FEW` samples is a pale dot alone.
    """
    from matplotlib.ticker import FuncFormatter

    figure, (top, bottom) = new_figure(4.8, 5.0, nrows=2, sharex=True, gridspec_kw={"height_ratios": [3.2, 1]})
    top.plot([0, 1], [0, 1], color=theme.muted, linestyle=(0, (4, 3)), linewidth=1, zorder=1)
    for i, (label, r, color) in enumerate(parts):
        share = np.sqrt(r.count / r.count.sum())
        for some, alpha in (((r.count > 0) & (r.count < FEW), 0.35), (r.count >= FEW, 1.0)):
            x, y = r.confidence[some], r.accuracy[some]
            top.scatter(
                x, y, s=14 + 80 * share[some], color=color, alpha=alpha, edgecolor=theme.paper, linewidth=0.6,
                zorder=3, clip_on=False,
            )  # fmt: skip
        low, high = wilson(y, r.count[some])
        top.vlines(x + 0.006 * i, low, high, color=color, linewidth=1.2, alpha=0.5)
        top.plot(x, y, color=color, linewidth=1.1, alpha=0.6)
        top.plot([], [], color=color, marker="o", markersize=5, label=f"{label}: ECE {100 * r.ece:.1f} %")
        bottom.stairs(np.maximum(r.count, 0.5), r.edges, baseline=0.5, color=color, linewidth=1.4)
        bottom.stairs(np.maximum(r.count, 0.5), r.edges, baseline=0.5, color=color, fill=True, alpha=0.15)
    top.set(xlim=(0, 1.01), ylim=(-0.02, 1.02), ylabel="accuracy")
    top.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=2, borderaxespad=0.2)
    most = max((r.count.max() for _, r, _ in parts), default=1)
    bottom.set(xlabel="confidence", ylabel="images", yscale="log", ylim=(0.5, 2 * max(most, 2)))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    bottom.minorticks_off()
    return figure


def priors(
    theme: Theme, names: Sequence[str], predicted: np.ndarray, estimates: dict[str, np.ndarray],
    source: np.ndarray | None = None, true: np.ndarray | None = None,
) -> Any:  # fmt: skip
    """Shares of the classes among target predictions (bars) against estimated, source and true shares (marks)."""
    c = len(names)
    first = next(iter(estimates.values()), predicted)
    keep = np.arange(c) if c <= MANY else np.sort(np.argsort(-np.abs(predicted - first), kind="stable")[:MANY])
    figure, axes = new_figure(float(np.clip(1.6 + 0.42 * len(keep), 4.8, 9.5)), 3.7)
    at = np.arange(len(keep))
    axes.bar(at, 100 * predicted[keep], color=TARGET, alpha=0.42, width=0.74, label="predicted on the target")
    if source is not None:
        axes.hlines(100 * source[keep], at - 0.37, at + 0.37, color=SOURCE, linewidth=1.6, label="source, labels")
    if true is not None:
        axes.scatter(
            at, 100 * true[keep], marker="o", s=46, facecolor="none", edgecolor=theme.ink, linewidth=1.2, zorder=4,
            label="target, true (oracle)",
        )  # fmt: skip
    colors = (RUNS[3], RUNS[2])
    for i, (name, value) in enumerate(estimates.items()):
        shift = (i - (len(estimates) - 1) / 2) * 0.3
        axes.scatter(
            at + shift, 100 * value[keep], marker="D^"[i % 2], s=26, color=colors[i % 2], zorder=5, label=name,
            edgecolor=theme.paper, linewidth=0.5,
        )  # fmt: skip
    long = max(len(names[k]) for k in keep) > 3
    axes.set_xticks(at, [names[k] for k in keep], rotation=90 if long and len(keep) > 6 else 0)
    axes.set(ylabel="share, %", ylim=(0, None), xlim=(-0.6, len(keep) - 0.4))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
    return figure
