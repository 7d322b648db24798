"""A classifier of K known classes and one for the unknown: one logit beside those of the model's own classifier."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.nn import full, no_autocast


def unknown_logit(z: Tensor, u: Tensor) -> Tensor:
    """``d = u - log sum_c exp(z_c)`` ``[B]``: the softmax over (z, u) says unknown with probability ``sigmoid(d)``.

    So the cross-entropy over K + 1 classes is that over K classes plus ``softplus(d)`` for a sample of a known class,
    and ``softplus(-d)`` for an unknown one.

    Args:
        z: logits of the known classes ``[B, K]``; u: logit of the unknown ``[B]`` or ``[B, 1]``.
    """
    with no_autocast(z):
        return full(u).reshape(len(z)) - full(z).logsumexp(1)


class UnknownClass(uda.Plugin):
    """Base: the logit of the unknown, its part of the source's cross-entropy, and the mark in inference.

    A sample of the target is unknown where this logit is above all of the K classes; its label is the best of these.
    Sources are never marked.

    Args:
        lr_scale: learning rate of the logit's weights relative to the head's.
    """

    settings = ("closed", "open", "multi-source")

    def __init__(self, lr_scale: float = 1.0) -> None:
        super().__init__()
        self.lr_scale = lr_scale
        self.unknown: nn.Linear | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Weights of the logit."""
        if self.unknown is None:
            self.unknown = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The logit at its own rate."""
        return [{"name": self.key, "params": self.unknown.parameters(), "lr_scale": self.lr_scale}]

    def source_known(self, step: uda.Step) -> Tensor:
        """What the class for the unknown adds to the sources' cross-entropy, with their sample weights."""
        losses = {}
        for name, batch in step.sources.items():
            loss = F.softplus(unknown_logit(batch.logits, self.unknown(batch.features)))
            losses[name] = (loss if batch.weight is None else loss * batch.weight).mean()
        return step.domain_mean(losses)

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: Any, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown where its logit is the largest of all K + 1."""
        z, u = full(batch.logits), full(self.unknown(batch.features))
        found = unknown_logit(z, u).sigmoid()
        if batch.role == "source":
            return replace(prediction, unknown_score=found)
        return prediction.rejecting(u.squeeze(1) > z.amax(1), found)
