"""Label-free model selection: scores of target predictions that need no target label. Larger is better."""

from __future__ import annotations

from torchmetrics import Metric

from uda.selection.scores import (
    Diversity,
    InformationMaximisation,
    NegativeEntropy,
    diversity,
    information_maximisation,
    negative_entropy,
)

SCORES: dict[str, type[Metric]] = {
    "im": InformationMaximisation,
    "entropy": NegativeEntropy,
    "diversity": Diversity,
}

__all__ = [
    "SCORES", "Diversity", "InformationMaximisation", "NegativeEntropy", "default_scores", "diversity",
    "information_maximisation", "negative_entropy",
]  # fmt: skip


def default_scores() -> dict[str, Metric]:
    """Fresh metrics by name; logged as ``select/<name>``."""
    return {name: cls() for name, cls in SCORES.items()}
