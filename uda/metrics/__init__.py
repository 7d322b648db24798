"""Metrics of partial, open-set and universal adaptation: pure functions, and torchmetrics classes on top.

Names are imported when first used, so that a table needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uda.metrics.clusters import H3Score, private_nmi
    from uda.metrics.counts import (
        OS,
        UNK,
        Accuracy,
        HScore,
        OSStar,
        OutlierShare,
        PartialAccuracy,
        accuracy,
        confusion_matrix,
        h3_score,
        h_score,
        harmonic_mean,
        known_accuracy,
        os,
        outlier_share,
        partial_accuracy,
        recalls,
        unk,
    )  # fmt: skip
    from uda.metrics.unknown import OSCR, UnknownAUROC, auroc, oscr

_WHERE = {
    **dict.fromkeys(("H3Score", "private_nmi"), "clusters"),
    **dict.fromkeys(("OSCR", "UnknownAUROC", "auroc", "oscr"), "unknown"),
    **dict.fromkeys(
        (
            "OS", "UNK", "Accuracy", "HScore", "OSStar", "OutlierShare", "PartialAccuracy", "accuracy",
            "confusion_matrix", "h3_score", "h_score", "harmonic_mean", "known_accuracy", "os", "outlier_share",
            "partial_accuracy", "recalls", "unk",
        ),
        "counts",
    ),
}  # fmt: skip
__all__ = [
    "OS", "OSCR", "UNK", "Accuracy", "H3Score", "HScore", "OSStar", "OutlierShare", "PartialAccuracy", "UnknownAUROC",
    "accuracy", "auroc", "confusion_matrix", "h3_score", "h_score", "harmonic_mean", "known_accuracy", "os", "oscr",
    "outlier_share", "partial_accuracy", "private_nmi", "recalls", "unk",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'uda.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"uda.metrics.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
