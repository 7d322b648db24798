"""A finished run, and what its model says about each domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uda.metrics.names import oracle

Which = Literal["last", "selected", "oracle"]

@dataclass
class Outcome:
    """What the model says about the evaluation images of one domain, in index order.

    Attributes:
        name: of the domain; ``is_target``: whether it is the target.
        features: ``[N, F]``; ``probs``: softmax ``[N, C]``.
        label: predicted class ``[N]``, C for unknown; ``score``: confidence ``[N]``.
        y: true class ``[N]``, C for a class that no source has, -1 where there is no label.
        ids: name of each row.
    """

    name: str
    is_target: bool
    features: np.ndarray
    probs: np.ndarray
    label: np.ndarray
    score: np.ndarray
    y: np.ndarray
    ids: list[str]

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return bool((self.y >= 0).any())

    @property
    def correct(self) -> np.ndarray:
        """Whether each labelled row is right (False without a label)."""
        return (self.y >= 0) & (self.label == self.y)

    @property
    def accuracy(self) -> float | None:
        """Of the labelled rows."""
        known = self.y >= 0
        return float(self.correct[known].mean()) if known.any() else None


@dataclass
class Run:
    """A finished run.

    Attributes:
        name: short, unlike those of other runs of the report; ``path``: its directory.
        config, summary, record: ``config.yaml``, ``summary.json``, ``run.json``.
        history: figures of each validation; ``objectives``: name -> steps and values.
        checkpoint: the file that was evaluated; ``which``: by which rule.
        outcomes: of each domain, sources first; empty where the model was not evaluated.
        source_prior: class shares of the source's training images ``[C]``.
        images: gives pictures ``[H, W, 3]`` (uint8) of target rows, or None where inputs are no images.
        notes: what is missing, and why.
    """

    name: str
    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    record: dict[str, Any]
    history: list[dict[str, Any]]
    objectives: dict[str, tuple[np.ndarray, np.ndarray]]
    checkpoint: Path | None = None
    which: Which = "last"
    checkpoint_step: int | None = None
    class_names: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    source_prior: np.ndarray | None = None
    images: Callable[[Sequence[int]], list[np.ndarray]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        """``source, source -> target``."""
        return f"{', '.join(self.summary.get('source') or []) or 'no source'} → {self.summary.get('target')}"

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several classes: average precisions stand in the place of accuracies."""
        return self.summary.get("task") == "multi-label"

    @property
    def measures(self) -> tuple[str, str]:
        """The measure of the run, and the one beside it."""
        return ("class_mean_ap", "mean_ap") if self.multi_label else ("target_accuracy", "target_class_accuracy")

    @property
    def headline(self) -> str:
        """The measure of the target in the history."""
        return oracle(self.measures[0])

    @property
    def source_headline(self) -> str:
        """That of the source, in history and summary."""
        return "source_class_mean_ap" if self.multi_label else "source_accuracy"

    @property
    def word(self) -> str:
        """What the measure is called."""
        return "average precision" if self.multi_label else "accuracy"

    @property
    def target(self) -> Outcome | None:
        """The target's outcome."""
        return next((o for o in self.outcomes if o.is_target), None)

    @property
    def sources(self) -> list[Outcome]:
        """The sources' outcomes."""
        return [o for o in self.outcomes if not o.is_target]

    @property
    def names_with_unknown(self) -> list[str]:
        """Class names, with ``unknown`` behind them where it occurs on the target."""
        c = len(self.class_names)
        found = self.target is not None and (self.target.y.max(initial=-1) >= c or self.target.label.max() >= c)
        return [*self.class_names, *(["unknown"] if found else [])]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure over the validations that have it."""
        rows = [r for r in self.history if math.isfinite(r.get(key, math.nan))]
        return np.array([r["step"] for r in rows], float), np.array([r[key] for r in rows], float)

    def row_of(self, which: Which) -> dict[str, Any] | None:
        """The validation that a rule takes."""
        if which == "last":
            return self.history[-1] if self.history else None
        if which == "selected":
            step = self.summary["selection"]["step"]
            return next((r for r in self.history if r["step"] == step), None) if step is not None else None
        rows = [r for r in self.history if math.isfinite(r.get(self.headline, math.nan))]
        return max(rows, key=lambda r: r[self.headline], default=None)
