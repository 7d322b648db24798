"""Shares of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uda.report.figures.classes import MANY
from uda.report.style import RUNS, SOURCE, TARGET, Theme, new_figure


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
