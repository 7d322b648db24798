"""RoTTA: statistics that move slowly, and a memory balanced over classes and time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from uda.errors import UDAError
from uda.losses import entropy
from uda.nn import full, no_autocast
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import colour_view, cross_entropy
from uda_testtime.surgery import has_statistics, norm_parameters


class RobustNorm(nn.Module):
    """A BatchNorm whose running statistics follow the batches, and which normalises by them (RoTTA, eq. 4 and 5).

    ``mean <- (1 - rate) mean + rate batch``, alike for the biased variance. While ``learning``, the mixed statistics
    normalise, with gradient through the batch's part; else the stored ones.

    Args:
        norm: the layer, whose running statistics are moved; rate: share of the batch.
    """

    def __init__(self, norm: _BatchNorm, rate: float) -> None:
        super().__init__()
        self.norm, self.rate, self.learning = norm, rate, False

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...] -> [B, C, ...]``."""
        n = self.norm
        if not self.learning or x.numel() == x.shape[1]:  # one value a channel has no statistics
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        with no_autocast(x):
            z = full(x)
            axes, shape = [0, *range(2, z.dim())], [1, -1, *[1] * (z.dim() - 2)]
            mean = torch.lerp(n.running_mean.clone(), z.mean(axes), self.rate)
            var = torch.lerp(n.running_var.clone(), z.var(axes, correction=0), self.rate)
            with torch.no_grad():
                n.running_mean.copy_(mean)
                n.running_var.copy_(var)
            out = (z - mean.view(shape)) * torch.rsqrt(var.view(shape) + n.eps)
            if n.weight is not None:
                out = out * n.weight.view(shape) + n.bias.view(shape)
        return out.to(x.dtype)


@contextmanager
def learning(net: nn.Module, rate: float | None = None) -> Iterator[None]:
    """Inside, the net's robust layers move their statistics, by ``rate`` or each by its own."""
    layers = [m for m in net.modules() if isinstance(m, RobustNorm)]
    rates = [m.rate for m in layers]
    for m in layers:
        m.learning, m.rate = True, m.rate if rate is None else rate
    try:
        yield
    finally:
        for m, own in zip(layers, rates, strict=True):
            m.learning, m.rate = False, own


def place(
    memory: list[dict[str, float]], label: int, uncertainty: float, capacity: int, classes: int,
    time_weight: float = 1.0, uncertainty_weight: float = 1.0,
) -> int | None:
    """Where a sample goes in a memory balanced over classes (RoTTA, algorithm 1).

    Args:
        memory: ``{"label", "uncertainty", "age"}`` of each item; label, uncertainty: of the new sample, in nats.
        capacity, classes: a class has room for ``capacity / classes`` items, a real number.
        time_weight, uncertainty_weight: of the score ``wt / (1 + exp(-age / capacity)) + wu * uncertainty / ln C``;
            the item with the largest leaves, if its score is above the new sample's at age 0.

    Returns:
        The item to be replaced, ``len(memory)`` for a free place, None if the sample is dropped.
    """

    def score(age: float, u: float) -> float:
        return time_weight / (1 + math.exp(-age / capacity)) + uncertainty_weight * u / math.log(classes)

    count = Counter(item["label"] for item in memory)
    if count[label] >= capacity / classes:
        pool = {label}
        if not count[label]:
            return None
    elif len(memory) < capacity:
        return len(memory)
    else:
        pool = {c for c, n in count.items() if n == max(count.values())}
    scores = {i: score(m["age"], m["uncertainty"]) for i, m in enumerate(memory) if m["label"] in pool}
    worst = max(scores, key=lambda i: scores[i])
    return worst if scores[worst] > score(0, uncertainty) else None


def timeliness(age: Tensor) -> Tensor:
    """``exp(-A) / (1 + exp(-A))`` of ages in units of the capacity (RoTTA, eq. 9)."""
    return torch.sigmoid(-age)


class RoTTA(Method):
    """Robust test-time adaptation on correlated, changing streams (Yuan et al., CVPR 2023).

    Scale and shift of normalisation layers are trained on the memory, once in ``every`` samples. Scored: the teacher's
    logits, with its stored statistics, before the batch enters the memory. Statistics move with ``lr=0``, too: with
    ``rate=0`` as well it is the source model.

    Args:
        lr: learning rate of Adam, published for all data sets; optimizer: or ``sgd``; weight: of the loss.
        rate: share of the memory's statistics in each update; momentum: of the teacher.
        capacity: of the memory; every: samples between updates.
        time_weight, uncertainty_weight: of the scores in the memory. flip: views may be mirrored.
    """

    scored = "the teacher's, before the update"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, rate: float = 0.05,
        momentum: float = 0.999, capacity: int = 64, every: int = 64, time_weight: float = 1.0,
        uncertainty_weight: float = 1.0, flip: bool = True,
    ) -> None:  # fmt: skip
        self.lr, self.optimizer, self.weight, self.rate, self.momentum = lr, optimizer, weight, rate, momentum
        self.capacity, self.every, self.flip = capacity, every, flip
        self.time_weight, self.uncertainty_weight = time_weight, uncertainty_weight

    def attach(self, a: Adapter) -> None:
        """Robust layers, a teacher, and an optimiser over scale and shift."""
        a.replace(has_statistics, lambda layer: RobustNorm(layer, self.rate))
        if not (parameters := norm_parameters(a.net)):
            raise UDAError("RoTTA: the model has no normalisation layer with scale and shift to train.")
        a.add("teacher", EMATeacher(a.net, buffers="none"))
        a.train_parameters(parameters, self.optimizer, self.lr)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits, with stored statistics."""
        return a.extra["teacher"](x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits; samples enter the memory one by one, and each ``every``-th brings an update."""
        with torch.no_grad():
            logits = a.extra["teacher"](x)
        items, inputs = a.state.setdefault("items", []), a.state.setdefault("inputs", [])
        labels, uncertain = logits.argmax(1).tolist(), entropy(logits).tolist()
        for i, (label, u) in enumerate(zip(labels, uncertain, strict=True)):
            where = place(
                items, label, u, self.capacity, logits.shape[1], self.time_weight, self.uncertainty_weight
            )
            if where is not None:
                items[where : where + 1] = [{"label": label, "uncertainty": u, "age": 0}]
                inputs[where : where + 1] = [x[i].clone()]
            for item in items:
                item["age"] += 1
            a.state["seen"] = a.state.get("seen", 0) + 1
            if a.state["seen"] % self.every == 0 and items:
                self._update(a, torch.stack(inputs), torch.tensor([m["age"] for m in items]))
        return logits

    def _update(self, a: Adapter, x: Tensor, age: Tensor) -> None:
        teacher = a.extra["teacher"]
        with learning(teacher), torch.no_grad():
            target = teacher(x)
        with learning(a.net):
            logits = a.net(colour_view(a, x, self.flip))
        w = timeliness(age.to(logits) / self.capacity)
        a.update(self.weight * (w * cross_entropy(target, logits)).mean())
        teacher.update(a.net, self.momentum)
