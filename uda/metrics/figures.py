"""All figures of one evaluation of the target, for the evaluation loop. Collective under several processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uda.metrics import counts
from uda.metrics.clusters import private_nmi
from uda.metrics.unknown import auroc, oscr
from uda.nn.bank import gather_rows
from uda.selection.pool import RowSample

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.plugin import Prediction
    from uda.step import DomainBatch

#: Largest number of target-private samples that are clustered.
CLUSTERED = 5000


class TargetFigures:
    """Takes in the target's batches of one pass and gives its measures by name (:data:`uda.metrics.names.MEASURES`).

    Those of open sets are there where the target has private classes.
    """

    def __init__(self, model: UDA) -> None:
        self.model = model
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []  # unknown score, label before rejection, truth
        self.private = RowSample(CLUSTERED)

    def update(self, batch: DomainBatch, prediction: Prediction, y: Tensor, rows: Tensor) -> None:
        """Take in this rank's own ``rows`` ``[B]`` (bool) of a batch; ``y`` ``[B]`` is -1 where there is no label."""
        labelled = rows & (y >= 0)
        found = prediction.unknown_scores.detach().float()[labelled], prediction.label[labelled], y[labelled]
        self.rows.append(found)
        if batch.index is not None and bool((private := labelled & (y >= self.model.num_classes)).any()):
            self.private.add(batch.index[private], batch.features[private].flatten(1).float(), y[private])

    def compute(self, confusion: Tensor) -> dict[str, float]:
        """Measures of the confusion matrix ``[C + 1, C + 1]`` of all ranks, and of what was taken in."""
        confusion, c = confusion.cpu(), self.model.num_classes
        out = {
            "target_accuracy": counts.accuracy(confusion),
            "target_class_accuracy": counts.accuracy(confusion, "class"),
        }
        known = confusion[:-1].sum(1)
        if (known == 0).any() and known.sum():
            out["outlier_share"] = counts.outlier_share(confusion)
        if confusion[-1].sum():
            score, label, y = (gather_rows(torch.cat(column)).cpu() for column in zip(*self.rows, strict=True))
            out |= {
                "known_accuracy": counts.known_accuracy(confusion, "instance"),
                "os": counts.os(confusion),
                "os_star": counts.known_accuracy(confusion),
                "unk": counts.unk(confusion),
                "h_score": counts.h_score(confusion),
                "h_score_instance": counts.h_score(confusion, "instance"),
                "auroc": auroc(score, y, c),
                "oscr": oscr(score, label, y, c),
                "private_nmi": (nmi := self._nmi()),
                "h3_score": counts.h3_score(confusion, nmi),
            }
        return {k: float(v) for k, v in out.items()}

    def _nmi(self) -> Tensor:
        """By the first rank alone, so that no two ranks disagree in the last digit."""
        model, i = self.model, torch.zeros(0, dtype=torch.long)
        _, features, y = self.private.gather(model.device, (i, torch.zeros(0, model.feature_dim), i))
        strategy = model.trainer.strategy
        return strategy.broadcast(private_nmi(features, y) if strategy.is_global_zero else None)
