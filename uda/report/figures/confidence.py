"""How often predictions are right, by their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uda.report.measures import Reliability
from uda.report.style import Theme, new_figure

FEW = 5  # samples of a bin below which its accuracy says nothing


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
