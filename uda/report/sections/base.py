"""What the parts of a report share: the runs, the figures so far, and the words for what is missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from uda.report import measures
from uda.report.collect import Run
from uda.report.figures import run_color
from uda.report.html import dot, text
from uda.report.style import Plot, inline_svg

RULES = {"last": "last epoch", "selected": "selected without labels", "oracle": "best epoch by target labels"}

NO_MODEL = "The model was not evaluated (see Results), so this part is left out."

NO_LABELS = "The target has no labels, so this part is left out."


@dataclass
class Report:
    """What is reported, and the figures so far.

    Attributes:
        runs: in the order given; the first one is what others are compared with.
        embedding: ``tsne``, ``umap``, ``pca`` or ``none``; ``max_samples``: of each domain in it; ``seed``: of both.
        mistakes: how many pictures of mistakes.
        plots: filled by :meth:`figure`.
    """

    runs: list[Run]
    embedding: str = "tsne"
    max_samples: int = 1000
    seed: int = 0
    mistakes: int = 24
    plots: list[Plot] = field(default_factory=list)

    @property
    def several(self) -> bool:
        """Whether runs are compared."""
        return len(self.runs) > 1

    def figure(self, plot: Plot) -> str:
        """A figure as HTML, and kept so that it can be written as a file; names are made safe and unlike others."""
        name = re.sub(r"[^A-Za-z0-9_.]+", "-", plot.name).strip("-")
        taken = {p.name for p in self.plots}
        plot = replace(plot, name=name if name not in taken else f"{name}-{len(self.plots)}")
        self.plots.append(plot)
        title = f'<div class="t">{plot.title}</div>' if plot.title else ""
        caption = f"<figcaption>{plot.caption}</figcaption>" if plot.caption else ""
        return f"<figure>{title}{inline_svg(plot)}{caption}</figure>"

    def grid(self, items: Iterable[str], css: str = "") -> str:
        """Figures side by side where there is room."""
        return f'<div class="grid {css}">{"".join(items)}</div>'

    def each(self, part: Callable[[int, Run], str]) -> str:
        """A part for each run, under its name where there are several."""
        if not self.several:
            return part(0, self.runs[0])
        return "".join(f"<h3>{dot(run_color(i))}{text(r.name)}</h3>{part(i, r)}" for i, r in enumerate(self.runs))

    def title(self, i: int) -> str:
        """Title of a figure of one run: its name, where there are several."""
        return f"{dot(run_color(i))}{text(self.runs[i].name)}" if self.several else ""

    def slug(self, name: str, i: int) -> str:
        """File name of a figure of one run."""
        return f"{name}-{i + 1}" if self.several else name


def method(run: Run) -> str:
    """Plugins by class name, such as ``CDAN + MCC``."""
    names = [p["class_path"].rsplit(".", 1)[-1] for p in (run.summary.get("plugins") or {}).values()]
    return " + ".join(names) or "source only"


def held_out(run: Run) -> bool:
    """Whether source accuracy is on images that were not trained on."""
    return float((run.config.get("data") or {}).get("source_val_fraction", 0.1)) > 0


def matrix_of(run: Run) -> np.ndarray:
    """Confusion matrix of the target."""
    return measures.confusion_matrix(run.target.label, run.target.y, len(run.names_with_unknown))


def lacking(run: Run) -> str | None:
    """Why a part that needs target labels is not there."""
    return NO_MODEL if run.target is None else None if run.target.labelled else NO_LABELS


def source_rows(run: Run) -> tuple[np.ndarray, np.ndarray] | None:
    """Probabilities and labels of the evaluation images of all sources, or None without a source."""
    if not run.sources:
        return None
    probs, y = (np.concatenate(x) for x in zip(*((o.probs, o.y) for o in run.sources), strict=True))
    known = (y >= 0) & (y < len(run.class_names))
    return probs[known], y[known]
