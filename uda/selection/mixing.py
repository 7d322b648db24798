"""MixVal: do predictions on mixed target inputs agree with those on the inputs?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from uda.errors import UDAError

SHARE = 0.55  # of the sample whose label the mixture should keep (the authors' default)


def partners(labels: Tensor, same: bool) -> Tensor:
    """Position of the next row (cyclic) of the same, or of another, class: ``[B]``, -1 where none."""
    n = len(labels)
    step = torch.arange(n, device=labels.device)
    at = (step[:, None] + step[None, 1:]) % max(n, 1)  # the others of each row, nearest first
    fits = (labels[at] == labels[:, None]) == same
    if n < 2:
        return torch.full((n,), -1, device=labels.device)
    first = fits.int().argmax(1)
    return torch.where(fits.any(1), at[step, first], -1)


def mix(x: Tensor, partner: Tensor, share: float = SHARE) -> Tensor:
    """``share * x_i + (1 - share) * x_partner(i)``, ``[B, ...]``.

    Raises:
        UDAError: inputs that are no real numbers (tokens).
    """
    if not x.is_floating_point():
        raise UDAError("MixVal adds inputs up, which these inputs (whole numbers) do not allow: leave mixval out.")
    return share * x + (1 - share) * x[partner]


def mixval(agree_same: Tensor, agree_other: Tensor) -> Tensor:
    """Mean of the two agreement rates, within clusters and between them; in ``[0, 1]`` (Hu et al. 2023).

    ``agree_*``: whether the predicted class of a mixture is that of its larger part, bool ``[n]`` each; an
    empty one is left out. The paper averages the two *ranks* among candidate models; of one model there is
    only this mean, which skada takes as well. Pairs are made within a batch, as in the authors' code. Fails
    on collapse (one class agrees with itself: 1), and needs inputs that can be added up.
    """
    rates = [a.double().mean() for a in (agree_same, agree_other) if len(a)]
    return torch.stack(rates).mean() if rates else torch.full((), torch.nan, dtype=torch.float64)


class MixVal(Metric):
    """Counts of :func:`mixval`; it takes two more forwards of the target than the other scores."""

    higher_is_better = True
    full_state_update = False
    reads: ClassVar[str] = "mixed"
    needs_source: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("agree", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, labels: Tensor, mixed_labels: Tensor, kind: int) -> None:
        """Predicted classes ``[B]`` of inputs and mixtures; ``kind`` 0: of one class, 1: of two."""
        self.agree[kind] += (labels == mixed_labels).sum()
        self.count[kind] += len(labels)

    def compute(self) -> Tensor:
        """Mean of the rates that have samples; NaN without any."""
        known = self.count > 0
        return (self.agree[known] / self.count[known]).mean()
