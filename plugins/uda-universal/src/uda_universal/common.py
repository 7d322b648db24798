"""What several universal methods need: a mark by a threshold, and values brought to [0, 1]."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import uda

SETTINGS = ("closed", "partial", "open", "universal", "multi-source")


def marked(batch: uda.DomainBatch, prediction: uda.Prediction, score: Tensor, limit: float) -> uda.Prediction:
    """The prediction with ``score > limit`` as unknown, beside what is unknown already; never on a source.

    Args:
        score: how unknown a sample is ``[B]``.
    """
    if batch.role == "source":
        return replace(prediction, unknown=None, unknown_score=score)
    return prediction.rejecting(score > limit, score)


def unit_range(values: Tensor) -> Tensor:
    """``(v - min) / (max - min)`` of ``[N]`` or of each column of ``[N, D]``; zeros where all are alike."""
    low, high = values.amin(0), values.amax(0)
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
