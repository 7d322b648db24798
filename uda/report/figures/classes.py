"""What is right and wrong, by class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uda.report.measures import class_accuracies
from uda.report.style import Theme, new_figure

MANY = 40  # classes from which on a figure shows the extremes alone

_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


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
