"""EATA: entropy of reliable samples, with weights that mattered to the source held in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uda_testtime.adapter import Adapter
from uda_testtime.parts import keep_start
from uda_testtime.reliable import ETA
from uda_testtime.source import SourceSamples


def squared_gradients(a: Adapter, source: SourceSamples, batch_size: int) -> list[Tensor]:
    """Diagonal of the Fisher information as EATA estimates it, a tensor for each trained parameter.

    The mean over batches of the **squared gradient of the batch's mean** cross-entropy with the predicted class. That
    is smaller than the mean of squared gradients of samples, and falls with the batch size: beta belongs to one size.
    """
    out, n, device = [torch.zeros_like(p) for p in a.parameters], 0, a.parameters[0].device
    for batch in source.batches(batch_size, a.generator):
        logits = a.net(batch["x"].to(device))
        grads = torch.autograd.grad(F.cross_entropy(logits, logits.detach().argmax(1)), a.parameters)
        for total, g in zip(out, grads, strict=True):
            total += g.square()
        n += 1
    return [t / n for t in out]


class EATA(ETA):
    """ETA with an anti-forgetting term (Niu et al., ICML 2022, eq. 8 and 9).

    ``L = weight * L_ETA + beta * sum_i F_i (theta_i - theta0_i)^2``. Scored: the logits before the update. It needs
    unlabelled source samples once, for ``F``; without them it is :class:`ETA`.

    Args:
        lr, optimizer, weight, source_weight, margin, redundancy: as in :class:`ETA`.
        beta: of the term (1 on CIFAR-C, 2000 on ImageNet-C).
        batch_size: of the source batches for ``F``.
    """

    needs = "inputs"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, source_weight: float = 0.0,
        margin: float = 0.4, redundancy: float = 0.4, beta: float = 1.0, batch_size: int = 64,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight, margin, redundancy)
        self.beta, self.batch_size = beta, batch_size

    def attach(self, a: Adapter) -> None:
        """As TENT, with a copy of the start."""
        super().attach(a)
        keep_start(a)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Fisher information of the source samples."""
        a.prepared["fisher"] = squared_gradients(a, source, self.batch_size)

    def penalty(self, a: Adapter) -> Tensor | float:
        """``beta * sum_i F_i (theta_i - theta0_i)^2``."""
        rows = zip(a.prepared["fisher"], a.parameters, a.extra["start"], strict=True)
        return self.beta * sum((f * (p - q).square()).sum() for f, p, q in rows)
