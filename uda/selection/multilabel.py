"""Label-free scores of multi-label predictions: each class is a decision of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

#: Those that multi-label runs have.
MULTI_LABEL_SCORES = ("im", "entropy", "diversity")


def binary_entropy(logits: Tensor) -> Tensor:
    """Entropy of each sigmoid in nats, ``[..., C]``; from logits, so no epsilon."""
    return F.binary_cross_entropy_with_logits(logits, logits.sigmoid(), reduction="none")


class MultiLabelScores(Metric):
    """Negative mean entropy, entropy of the mean prediction, and their sum (``im``), each a mean over the classes.

    ``select/collapsed`` is 1 where no class tells samples apart: the standard deviation of every class's probability is
    below 1e-3.

    Args:
        num_classes: C; names: of the scores that are asked for.
    """

    full_state_update = False

    def __init__(self, num_classes: int, names: tuple[str, ...] = MULTI_LABEL_SCORES, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = [n for n in names if n in MULTI_LABEL_SCORES]
        for state, shape in {"p": (num_classes,), "square": (num_classes,), "h": (num_classes,), "n": ()}.items():
            self.add_state(state, torch.zeros(shape), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Logits ``[B, C]`` of target rows."""
        z = logits.detach().float()
        p = z.sigmoid()
        self.p, self.square, self.n = self.p + p.sum(0), self.square + p.square().sum(0), self.n + len(p)
        self.h = self.h + binary_entropy(z).sum(0)

    def compute(self) -> dict[str, float]:
        """``select/<name>``, ``select/collapsed``, and ``guarded/<name>``, -inf on collapse."""
        if not float(self.n):
            return {}
        mean = (self.p / self.n).double().clamp(1e-12, 1 - 1e-12)
        spread = ((self.square / self.n).double() - mean.square()).clamp(min=0).sqrt()
        entropy = -float((self.h / self.n).mean())
        diversity = float(-(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean())
        values = {"im": diversity + entropy, "entropy": entropy, "diversity": diversity}
        collapsed = bool((spread < 1e-3).all())
        shown = {f"select/{n}": values[n] for n in self.names}
        guarded = {f"guarded/{n}": -torch.inf if collapsed else v for n, v in values.items()}
        return {**shown, "select/collapsed": float(collapsed), **guarded}
