"""What several universal methods need: the whole target as the model sees it now, and a mark by a threshold."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import uda
from uda.passes import DomainPool, walk

SETTINGS = ("closed", "partial", "open", "universal", "multi-source")


def target_now(model: uda.UDA) -> DomainPool | None:
    """The target's training pool through the model as it is, without labels; None where no data module is at hand.

    For the hook ``before_evaluation``: costs one pass over the target.
    """
    trainer = model._trainer
    if trainer is None or trainer.sanity_checking or getattr(trainer, "datamodule", None) is None:
        return None
    return walk(model, model.target_name, "target", trainer.datamodule.pool_dataloader(model.target_name))


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
