"""Metrics of the unknown score at all thresholds: AUROC and OSCR."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat


def _pairs(known: Tensor, weight: Tensor, private: Tensor) -> Tensor:
    """Mean over pairs of ``weight`` where the private sample scores higher, half of it where both are equal.

    Args:
        known: scores of the known samples ``[n]``; ``weight``: ``[n]``; ``private``: scores of the others ``[m]``.
    """
    if not len(known) or not len(private):
        return torch.full((), torch.nan, dtype=torch.float64)
    ordered = private.sort().values
    below = torch.searchsorted(ordered, known)
    up_to = torch.searchsorted(ordered, known, right=True)
    higher = (len(ordered) - up_to).double() + (up_to - below).double() / 2
    return (weight.double() * higher).sum() / len(known) / len(ordered)


def auroc(unknown_score: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Area under the ROC curve of the unknown score, target-private against known; chance is 0.5.

    Args:
        unknown_score: ``[N]``, larger is more unknown.
        y: truth ``[N]``; ``num_classes`` and above are target-private; negative ones are left out.
        num_classes: C, the classes of the source.

    Returns:
        A scalar, float64; NaN where there are no samples of one kind.
    """
    score, known, private = unknown_score.double(), (y >= 0) & (y < num_classes), y >= num_classes
    return _pairs(score[known], torch.ones_like(score[known]), score[private])


def oscr(unknown_score: Tensor, label: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Area under the open-set classification rate curve (Dhamija et al., NeurIPS 2018; area: Vaze et al., ICLR 2022).

    The curve is the share of the known samples that are accepted and rightly classified, over the share of the
    target-private ones that are accepted, as the threshold on the unknown score moves. It equals AUROC where every
    known sample gets its right label. Arguments as in :func:`auroc`; ``label`` ``[N]`` is that before any rejection.
    """
    score, known, private = unknown_score.double(), (y >= 0) & (y < num_classes), y >= num_classes
    return _pairs(score[known], (label == y)[known], score[private])


class ScoreMetric(Metric):
    """A function of all unknown scores as a metric: keeps three numbers a sample.

    Args:
        num_classes: C, the classes of the source.
    """

    higher_is_better = True
    full_state_update = False
    of: ClassVar[Callable[[Tensor, Tensor, Tensor, int], Tensor]]

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        for name in ("score", "label", "y"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, unknown_score: Tensor, label: Tensor, y: Tensor) -> None:
        """Scores, labels before rejection, and truth of a batch, ``[B]`` each."""
        self.score.append(unknown_score.detach())
        self.label.append(label)
        self.y.append(y)

    def compute(self) -> Tensor:
        """A scalar in [0, 1], NaN where there are no samples of one kind."""
        score, label, y = (dim_zero_cat(getattr(self, n)) for n in ("score", "label", "y"))
        return type(self).of(score, label, y, self.num_classes)


class UnknownAUROC(ScoreMetric):
    """:func:`auroc`."""

    of = staticmethod(lambda score, label, y, num_classes: auroc(score, y, num_classes))


class OSCR(ScoreMetric):
    """:func:`oscr`."""

    of = staticmethod(oscr)
