"""Looking at what a run does to its representations; nothing here has a part in training or model selection."""

from __future__ import annotations

from uda.diagnostics.cka import (
    cka,
    covariance_similarity,
    dcka,
    deconfound,
    explained_by,
    gram,
    hsic,
    kernel_similarity,
)
from uda.diagnostics.similarity import RepresentationSimilarity

__all__ = [
    "RepresentationSimilarity", "cka", "covariance_similarity", "dcka", "deconfound", "explained_by", "gram", "hsic",
    "kernel_similarity",
]  # fmt: skip
