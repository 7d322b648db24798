"""Measures of multi-label tasks: average precision over classes, and over samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_ranking_average_precision

from uda.nn.bank import gather_rows


def class_mean_ap(probs: Tensor, y: Tensor) -> Tensor:
    """Mean over the classes that occur of the average precision of their scores (cmAP), a scalar.

    Args:
        probs: ``[N, C]``, any score that rises with certainty; y: 0 or 1 ``[N, C]``.
    """
    present = y.sum(0) > 0
    if not present.any():
        return torch.full((), torch.nan)
    p, t = probs[:, present].double(), y[:, present].long()
    return multilabel_average_precision(p, t, p.shape[1], average="none", validate_args=False).mean()


def mean_ap(probs: Tensor, y: Tensor) -> Tensor:
    """Mean over the samples with a class of the average precision of their ranking of the classes (mAP), a scalar."""
    rows = y.sum(1) > 0
    if not rows.any():
        return torch.full((), torch.nan)
    p, t = probs[rows].double(), y[rows].long()
    return multilabel_ranking_average_precision(p, t, p.shape[1], validate_args=False)


class MultiLabelFigures:
    """Takes in the batches of one domain and gives its measures by name. Collective under several processes."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.rows = [(torch.zeros(0, num_classes, device=device), torch.zeros(0, num_classes, device=device))]

    def update(self, probs: Tensor, y: Tensor, rows: Tensor) -> None:
        """This rank's own ``rows`` of ``[B, C]``; rows of -1 have no label."""
        rows = rows & (y >= 0).all(1)
        self.rows.append((probs[rows].detach().float(), y[rows].float()))

    def compute(self) -> dict[str, float]:
        """``class_mean_ap`` and ``mean_ap``; nothing for an unlabelled domain."""
        probs, y = (gather_rows(torch.cat(column)).cpu() for column in zip(*self.rows, strict=True))
        if not len(y):
            return {}
        return {"class_mean_ap": float(class_mean_ap(probs, y)), "mean_ap": float(mean_ap(probs, y))}
