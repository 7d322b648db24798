"""PETAL: CoTTA with a Gaussian over the source's weights, and what mattered little going back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda_testtime.adapter import Adapter
from uda_testtime.cotta import CoTTA
from uda_testtime.parts import restore_at_random
from uda_testtime.source import SourceSamples


def quantile(values: list[Tensor], share: float) -> Tensor:
    """The ``share`` quantile over all entries, between the two nearest (linear); without sorting them all."""
    flat = torch.cat([v.flatten() for v in values])
    place = share * (flat.numel() - 1)
    low = int(place)
    first = flat.kthvalue(low + 1).values
    second = flat.kthvalue(min(low + 2, flat.numel())).values
    return torch.lerp(first, second, place - low)


def weight_posterior(
    a: Adapter, source: SourceSamples, epochs: int, lr: float, batch_size: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of the weights along further source training (diagonal SWAG: Maddox et al., 2019).

    Moments after each batch; the net is as before afterwards.
    """
    start, device = [p.detach().clone() for p in a.parameters], a.parameters[0].device
    optimizer = torch.optim.SGD(a.parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    mean, square, n = [torch.zeros_like(p) for p in start], [torch.zeros_like(p) for p in start], 0
    for _ in range(epochs):
        for batch in source.batches(batch_size, a.generator):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(a.net(batch["x"].to(device)), batch["y"].to(device)).backward()
            optimizer.step()
            n += 1
            with torch.no_grad():  # around the start: differences keep their digits
                for p, q, m, s in zip(a.parameters, start, mean, square, strict=True):
                    d = p - q
                    m.lerp_(d, 1 / n)
                    s.lerp_(d.square(), 1 / n)
    with torch.no_grad():
        for p, q in zip(a.parameters, start, strict=True):
            p.copy_(q)
            p.grad = None
    variance = [(s - m.square()).clamp_min(0) for m, s in zip(mean, square, strict=True)]
    return [q + m for q, m in zip(start, mean, strict=True)], variance


class PETAL(CoTTA):
    """A probabilistic framework for lifelong test-time adaptation (Brahma & Rai, CVPR 2023).

    CoTTA's loss plus ``prior / 2 * sum_i (theta_i - mu_i)^2 / (var_i + damp)``; after the step and the teacher's move,
    entries whose squared gradient is below the ``share`` quantile go back to the source (PETAL-FIM). It needs labelled
    source samples once, for ``mu`` and ``var``. Scored: the teacher's logits before it moves.

    Args:
        lr, optimizer, weight, threshold, views, flip, momentum, loss, source_weight: as in :class:`CoTTA`.
        prior: of the Gaussian (1e-9 CIFAR-C, 1e-11 ImageNet-C); damp: added to the variance.
        share: of the entries that go back (0.03 CIFAR-C, 0.003 ImageNet-C); restore: instead, at random (PETAL-SRes).
        epochs, source_lr, batch_size: of the further source training by SGD.
    """

    needs = "labels"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, threshold: float = 0.92, views: int = 32,
        flip: bool = True, momentum: float = 0.999, restore: float = 0.0, loss: str = "ce", source_weight: float = 0.0,
        prior: float = 1e-9, damp: float = 1e-6, share: float = 0.03, epochs: int = 3, source_lr: float = 0.01,
        batch_size: int = 200,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, threshold, views, flip, momentum, restore, loss, source_weight)
        if not 0 <= share < 1:
            raise UDAError(f"PETAL: share lies in [0, 1), not {share}.")
        self.prior, self.damp, self.share = prior, damp, share
        self.epochs, self.source_lr, self.batch_size = epochs, source_lr, batch_size

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """The Gaussian; net, teacher and source model stay as they are."""
        mean, variance = weight_posterior(a, source, self.epochs, self.source_lr, self.batch_size)
        a.prepared.update(mean=mean, variance=variance)

    def objective(self, a: Adapter, target: Tensor, logits: Tensor) -> Tensor:
        """CoTTA's loss and the Gaussian's."""
        rows = zip(a.parameters, a.prepared["mean"], a.prepared["variance"], strict=True)
        far = sum(((p - m).square() / (v + self.damp)).sum() for p, m, v in rows)
        return super().objective(a, target, logits) + self.prior / 2 * far

    @torch.no_grad()
    def settle(self, a: Adapter) -> None:
        """Move the teacher, then restore what mattered little."""
        a.extra["teacher"].update(a.net, self.momentum)
        source = list(a.extra["source"].parameters())
        restore_at_random(a, source, self.restore)
        if self.share > 0 and self.restore == 0:
            fisher = [p.grad.square() if p.grad is not None else torch.zeros_like(p) for p in a.parameters]
            limit = quantile(fisher, self.share)
            for p, q, f in zip(a.parameters, source, fisher, strict=True):
                p.copy_(torch.where(f < limit, q, p))
