"""Running sums over target predictions: all that the cheap scores and the collapse guard need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric

from uda.errors import UDAError
from uda.nn.precision import no_autocast


@dataclass
class Sums:
    """Sums over ``n`` target samples with softmax predictions ``p_i`` over ``C`` classes.

    Attributes:
        p: ``sum_i p_i``, ``[C]``.
        h: ``sum_i H(p_i)`` in nats, a scalar.
        gram: ``sum_i p_i p_i^T``, ``[C, C]``.
        votes: samples by predicted class, ``[C]``.
        n: number of samples, a scalar.
    """

    p: Tensor
    h: Tensor
    gram: Tensor
    votes: Tensor
    n: Tensor

    @classmethod
    def of(cls, logits: Tensor) -> Sums:
        """Sums of logits ``[N, C]``, in float64 (float32 on devices that lack it).

        Raises:
            UDAError: not a matrix of at least one row and two classes.
        """
        if logits.ndim != 2 or logits.shape[1] < 2:
            raise UDAError(f"Scores need logits [N, C] with C >= 2, got shape {tuple(logits.shape)}.")
        with no_autocast(logits):
            wide = torch.float32 if logits.device.type == "mps" else torch.float64
            log_p = logits.detach().to(wide).log_softmax(1)
            p = log_p.exp()
            votes = torch.bincount(logits.argmax(1), minlength=logits.shape[1]).to(wide)
            # exp underflows to 0 long before log_p is infinite, so 0 * log 0 does not occur
            return cls(p.sum(0), -(p * log_p).sum(), p.T @ p, votes, p.new_tensor(float(len(p))))


class PredictionSums(Metric):
    """Collects :class:`Sums` batch by batch; states add over batches and ranks.

    Args:
        num_classes: to be given where a rank may stay without a batch: states have their full size at once.
        dtype: of the states in that case.
    """

    higher_is_better = True
    full_state_update = False
    #: what the score reads: ``sums`` of predictions, the ``pool`` of both domains, or mixed inputs
    reads: ClassVar[str] = "sums"
    needs_source: ClassVar[bool] = False

    def __init__(self, num_classes: int = 1, dtype: torch.dtype = torch.float64, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        c = num_classes  # states of size 1 take the width of the first batch
        for name, shape in {"p": (c,), "h": (), "gram": (c, c), "votes": (c,), "n": ()}.items():
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Logits ``[B, C]`` of a batch."""
        if len(logits):
            new = Sums.of(logits)
            for name in ("p", "h", "gram", "votes", "n"):
                setattr(self, name, getattr(self, name) + getattr(new, name))

    def sums(self) -> Sums:
        """The sums so far, on the CPU in float64."""
        return Sums(*(getattr(self, name).cpu().double() for name in ("p", "h", "gram", "votes", "n")))

    def compute(self) -> Any:
        """The score as a scalar; here, the sums themselves."""
        return self.sums()
