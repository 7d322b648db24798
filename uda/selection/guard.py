"""The collapse guard: predictions that cannot be right however good their scores are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from uda.errors import UDAError
from uda.selection.spectral import effective_rank, singular_values
from uda.selection.sums import Sums


class Collapse(NamedTuple):
    """What the guard saw.

    Attributes:
        collapsed: whether any threshold is passed.
        used: share of the classes that are predicted at all, of ``min(C, N)``.
        largest: share of the samples in the most predicted class.
        rank: effective rank of the softmax predictions, in ``[1, min(C, N)]``.
    """

    collapsed: bool
    used: float
    largest: float
    rank: float


@dataclass(frozen=True)
class CollapseGuard:
    """Thresholds; the defaults are meant for closed sets and leave room for partial targets.

    Args:
        min_used: collapsed below this share of classes in use. Lower it where the target has few of the
            classes.
        max_share: collapsed above this share of the largest class. Raise it for targets that are so
            unbalanced.
        min_rank: collapsed below this effective rank: predictions that are all (nearly) the same, whatever
            the
            histogram of their maxima.
    """

    min_used: float = 0.2
    max_share: float = 0.8
    min_rank: float = 1.2

    def __post_init__(self) -> None:
        for name in ("min_used", "max_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UDAError(f"{name} is a share of 1, got {getattr(self, name)}.")

    def check(self, sums: Sums) -> Collapse:
        """Look at the sums of a pass."""
        n = float(sums.n)
        used = float((sums.votes > 0).sum()) / min(n, len(sums.votes))
        largest = float(sums.votes.max()) / n
        rank = float(effective_rank(singular_values(sums.gram)))
        found = used < self.min_used or largest > self.max_share or rank < self.min_rank
        return Collapse(found, used, largest, rank)


def collapse(logits: Tensor, guard: CollapseGuard | None = None) -> Collapse:
    """Whether target predictions ``[N, C]`` have collapsed, with the three measures."""
    return (guard or CollapseGuard()).check(Sums.of(torch.as_tensor(logits)))
