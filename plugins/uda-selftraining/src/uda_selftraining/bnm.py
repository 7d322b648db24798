"""Batch nuclear-norm maximisation (BNM: Cui et al., CVPR 2020; the fast form: Cui et al. 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.nn import full, no_autocast
from uda.nn import ramp as ramp_factor

#: Divisor of the nuclear norm of a ``[B, C]`` matrix, by name.
SCALES = {
    "batch": lambda b, c: b,
    "mean": lambda b, c: min(b, c),
    "bound": lambda b, c: (min(b, c) * b) ** 0.5,
}


def nuclear_norm(probs: Tensor) -> Tensor:
    """Sum of the singular values of ``[B, C]``, float32. Its gradient ``U V^T`` is finite where values repeat."""
    with no_autocast(probs):
        return torch.linalg.svdvals(full(probs)).sum()


def fast_nuclear_norm(probs: Tensor) -> Tensor:
    """Sum of the ``min(B, C)`` largest column norms of ``[B, C]``, which needs no decomposition (Cui et al. 2021)."""
    with no_autocast(probs):
        columns = torch.linalg.vector_norm(full(probs), dim=0)
        return columns.topk(min(probs.shape)).values.sum()


class BNM(uda.Plugin):
    """Maximise the nuclear norm of the target batch's predictions: sure and diverse (Cui et al. 2020, equation 8).

    The nuclear norm of the softmax matrix ``P`` ``[B, C]`` bounds its Frobenius norm (sureness) and its rank
    (diversity). The objective is ``1 - |P|_* / scale``; the constant keeps it non-negative for ``bound`` and changes
    no gradient. Under several processes each process has the norm of its own batch.

    Args:
        weight: of the objective (the paper: 1).
        scale: what divides the norm, since implementations differ and weights do not carry over between them:
            ``batch`` B (the paper); ``mean`` min(B, C), the mean singular value (the authors' code); ``bound``
            sqrt(B min(B, C)), the norm's largest value (ATDOC's code).
        fast: the sum of the largest column norms instead (FBNM), cheaper for hundreds of classes.
        ramp: growth of the weight over the run's progress: ``none`` (the paper), ``linear``, ``warm_start``.
    """

    settings = ("closed", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 3.0, "log"), "fast": [False, True], "ramp": ["none", "linear"],
    }  # fmt: skip

    def __init__(self, weight: float = 1.0, scale: str = "batch", fast: bool = False, ramp: str = "none") -> None:
        super().__init__()
        if weight < 0:
            raise uda.UDAError("BNM: weight must not be negative.")
        check_choice("BNM", "scale", scale, SCALES)
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.scale, self.fast, self.ramp = weight, scale, fast, ramp

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """One minus the scaled norm."""
        logits = step.target.logits
        with no_autocast(logits):
            probs = full(logits).softmax(1)
        norm = fast_nuclear_norm(probs) if self.fast else nuclear_norm(probs)
        weight = self.weight * ramp_factor(self.ramp, step.progress)
        return {"nuclear_norm": weight * (1 - norm / SCALES[self.scale](*probs.shape))}
