"""CoTTA: a teacher averaged over weights and views, and weights that return to the source at random."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from uda.errors import UDAError
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import all_parameters, colour_view, cross_entropy, restore_at_random, symmetric_cross_entropy
from uda_testtime.surgery import mix_statistics


@torch.no_grad()
def averaged_logits(a: Adapter, x: Tensor, threshold: float, views: int, flip: bool) -> Tensor:
    """The teacher's logits ``[B, C]``, the mean over views where the source model is unsure (CoTTA, eq. 3 and 4).

    Unsure: the batch's mean of the source model's largest probability is below ``threshold``; one decision a batch.
    """
    teacher = a.extra["teacher"]
    if views < 1 or float(a.extra["source"](x).softmax(1).max(1).values.mean()) >= threshold:
        return teacher(x)
    return sum(teacher(colour_view(a, x, flip)) for _ in range(views)) / views


class CoTTA(Method):
    """Consistency with an averaged teacher, and random restoration (Wang et al., CVPR 2022).

    All parameters are trained. Scored: the teacher's logits before its average moves. With ``lr=0`` and
    ``threshold=0`` that is the source model with the batch's statistics.

    Args:
        lr: learning rate (1e-3 CIFAR-C; SGD 0.01 ImageNet-C); optimizer: ``adam`` or ``sgd``; weight: of the loss.
        threshold: of the source model's mean confidence (0.92 CIFAR-10, 0.72 CIFAR-100, 0.1 ImageNet); 0: no views.
        views: so many; each is a forward of the teacher. flip: views may be mirrored.
        momentum: of the teacher; restore: probability of each weight to go back (0.01 CIFAR, 0.001 ImageNet).
        loss: ``ce`` (CIFAR), or ``symmetric``, the authors' choice on ImageNet.
        source_weight: share of the source's BatchNorm statistics.
    """

    scored = "the teacher's, before it moves"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, threshold: float = 0.92, views: int = 32,
        flip: bool = True, momentum: float = 0.999, restore: float = 0.01, loss: Literal["ce", "symmetric"] = "ce",
        source_weight: float = 0.0,
    ) -> None:  # fmt: skip
        if loss not in ("ce", "symmetric"):
            raise UDAError(f"{type(self).__name__}: loss is 'ce' or 'symmetric', not {loss!r}.")
        self.lr, self.optimizer, self.weight, self.threshold = lr, optimizer, weight, threshold
        self.views, self.flip, self.momentum, self.restore = views, flip, momentum, restore
        self.loss, self.source_weight = loss, source_weight

    def attach(self, a: Adapter) -> None:
        """Batch statistics; the source model and a teacher beside the net."""
        mix_statistics(a, self.source_weight)
        a.add("source", a.copy())
        a.add("teacher", EMATeacher(a.net, buffers="none"))
        a.train_parameters(all_parameters(a, type(self).__name__), self.optimizer, self.lr)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits."""
        return a.extra["teacher"](x)

    def objective(self, a: Adapter, target: Tensor, logits: Tensor) -> Tensor:
        """What the step minimises."""
        distance = cross_entropy if self.loss == "ce" else symmetric_cross_entropy
        return self.weight * distance(target, logits).mean()

    def settle(self, a: Adapter) -> None:
        """After the step: move the teacher, then restore."""
        a.extra["teacher"].update(a.net, self.momentum)
        restore_at_random(a, list(a.extra["source"].parameters()), self.restore)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits, and one step of the net towards them."""
        target = averaged_logits(a, x, self.threshold, self.views, self.flip)
        a.update(self.objective(a, target, a.net(x)))
        self.settle(a)
        return target
