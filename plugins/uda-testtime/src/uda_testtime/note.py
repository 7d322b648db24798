"""NOTE: BatchNorm that heeds single instances, and a memory balanced over classes and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda.losses import entropy
from uda.nn import full, no_autocast
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import all_parameters
from uda_testtime.rotta import RobustNorm, learning
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import has_statistics, norm_parameters


def soft_shrink(x: Tensor, limit: Tensor) -> Tensor:
    """``sign(x) max(|x| - limit, 0)``, the limit a tensor (NOTE, section 3.1)."""
    return (x - limit).relu() - (-x - limit).relu()


def instance_aware(x: Tensor, mean: Tensor, var: Tensor, k: float, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics of each instance as far as they are significant, else the common ones (NOTE, section 3.1).

    Args:
        x: ``[B, C, ...]`` with more than one position; mean, var: common statistics ``[1, C, 1, ...]``.
        k: how many standard errors an instance's statistic may be off before it counts; eps: of the layer.

    Returns:
        Mean and variance ``[B, C, 1, ...]``; the variance of an instance is unbiased, and not below 0.
    """
    n = x[0, 0].numel()
    own_var, own_mean = torch.var_mean(x, list(range(2, x.dim())), correction=1, keepdim=True)
    error_mean, error_var = ((var + eps) / n).sqrt(), (var + eps) * (2 / (n - 1)) ** 0.5
    mean = mean + soft_shrink(own_mean - mean, k * error_mean)
    return mean, (var + soft_shrink(own_var - var, k * error_var)).relu()


class InstanceAwareNorm(RobustNorm):
    """Instance-aware BatchNorm (IABN) in the place of a BatchNorm.

    Common statistics are the running ones; while ``learning`` those of the batch, with its unbiased variance, by which
    the running ones move. Where instances have one position (feature rows) it is a BatchNorm.

    Args:
        norm: the layer, whose scale, shift and running statistics are used; rate: share of the batch; k: as in
            :func:`instance_aware`.
    """

    def __init__(self, norm: torch.nn.Module, rate: float, k: float) -> None:
        super().__init__(norm, rate)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...] -> [B, C, ...]``."""
        n, rows = self.norm, x[0, 0].numel() == 1
        learns = self.learning and x.numel() > x.shape[1]  # one value a channel has no statistics
        if rows and not learns:
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        with no_autocast(x):
            z, shape = full(x), [1, -1, *[1] * (x.dim() - 2)]
            mean, var = n.running_mean, n.running_var
            if learns:
                var, mean = torch.var_mean(z, [0, *range(2, z.dim())], correction=1)
                with torch.no_grad():
                    n.running_mean.lerp_(mean.to(n.running_mean), self.rate)
                    n.running_var.lerp_(var.to(n.running_var), self.rate)
            mean, var = mean.view(shape), var.view(shape)
            if not rows:
                mean, var = instance_aware(z, mean, var, self.k, n.eps)
            out = (z - mean) * torch.rsqrt(var + n.eps)
            if n.weight is not None:
                out = out * n.weight.view(shape) + n.bias.view(shape)
        return out.to(x.dtype)


def place(stored: Sequence[int], label: int, count: int, capacity: int, draws: Sequence[float]) -> int | None:
    """Where a sample goes by prediction-balanced reservoir sampling (NOTE, section 3.2).

    Args:
        stored: predicted labels of the items; label: of the new sample; count: samples of that label so far, with it.
        capacity: of the memory; draws: three uniform numbers in [0, 1).

    Returns:
        The item to be replaced, ``len(stored)`` for a free place, None if the sample is dropped. A full memory gives up
        an item of a largest class, or, to a sample of such a class, one of its own with probability ``stored of the
        class / count``.
    """
    if len(stored) < capacity:
        return len(stored)
    sizes = Counter(stored)
    largest = sorted(c for c, n in sizes.items() if n == max(sizes.values()))
    if label not in largest:
        label = largest[int(draws[1] * len(largest))]
    elif draws[0] > sizes[label] / count:
        return None
    items = [i for i, c in enumerate(stored) if c == label]
    return items[int(draws[2] * len(items))]


class NOTE(Method):
    """Instance-aware normalisation and balanced sampling for correlated streams (Gong et al., NeurIPS 2022).

    The paper trains the source model with IABN. Here IABN takes the place of BatchNorm in a trained model, which learns
    on with it on labelled source samples for ``epochs``, as the authors do for ImageNet. Scale and shift are then
    trained on the memory, once in ``every`` samples. Scored: the logits with running statistics, before a sample enters
    the memory: one by one or in batches, predictions are the same. With ``lr=0`` and ``rate=0`` nothing moves.

    Args:
        lr: learning rate of Adam, published for all data sets; optimizer: or ``sgd``; weight: of the entropy.
        rate: share of the memory's statistics in each update; k: of :func:`instance_aware`.
        capacity: of the memory; every: samples between updates.
        epochs: over the source samples before the stream, all weights by SGD of momentum 0.9 (Nesterov) at
            ``source_lr`` in batches of ``batch_size``; 0: none, and no source samples are needed.
    """

    scored = "before the update"

    def __init__(
        self, lr: float = 1e-4, optimizer: str = "adam", weight: float = 1.0, rate: float = 0.01, k: float = 4.0,
        capacity: int = 64, every: int = 64, epochs: int = 30, source_lr: float = 1e-3, batch_size: int = 256,
    ) -> None:  # fmt: skip
        if k < 0 or min(capacity, every) < 1:
            raise UDAError(f"NOTE: k={k} may not be negative, capacity={capacity} and every={every} not below 1.")
        self.lr, self.optimizer, self.weight, self.rate, self.k = lr, optimizer, weight, rate, k
        self.capacity, self.every = capacity, every
        self.epochs, self.source_lr, self.batch_size = epochs, source_lr, batch_size
        self.needs = "labels" if epochs else "nothing"

    def attach(self, a: Adapter) -> None:
        """Instance-aware layers, and an optimiser over scale and shift."""
        if not a.replace(has_statistics, lambda layer: InstanceAwareNorm(layer, self.rate, self.k)):
            raise UDAError("NOTE: the model has no BatchNorm with running statistics to take the place of.")
        if not (parameters := norm_parameters(a.net)):
            raise UDAError("NOTE: the model has no normalisation layer with scale and shift to train.")
        a.train_parameters(parameters, self.optimizer, self.lr)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Further training of the source model with the new layers, whose statistics move at the rate of BatchNorm."""
        parameters = all_parameters(a, "NOTE")
        a.train_parameters(parameters, "sgd", self.source_lr, nesterov=True)
        with learning(a.net, 0.1):
            for _ in range(self.epochs):
                for batch in source.batches(self.batch_size, a.generator):
                    x, y = (batch[name].to(parameters[0].device) for name in ("x", "y"))
                    a.update(F.cross_entropy(full(a.net(x)), y))
        a.updates = 0
        a.train_parameters(norm_parameters(a.net), self.optimizer, self.lr)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits; each ``every``-th sample brings an update, after which the rest of the batch is predicted."""
        out = []
        while len(x):
            now, x = x.tensor_split([self.every - a.state.get("seen", 0) % self.every])
            with torch.no_grad():
                out.append(a.net(now))
            self._remember(a, now, out[-1])
            if a.state["seen"] % self.every == 0:
                self._update(a)
        return torch.cat(out)

    def _remember(self, a: Adapter, x: Tensor, logits: Tensor) -> None:
        memory, inputs = a.state.setdefault("labels", []), a.state.setdefault("inputs", [])
        counts = a.state.setdefault("counts", [0] * logits.shape[1])
        draws = torch.rand(len(x), 3, generator=a.generator).tolist()
        for i, label in enumerate(logits.argmax(1).tolist()):
            counts[label] += 1
            if (where := place(memory, label, counts[label], self.capacity, draws[i])) is not None:
                memory[where : where + 1], inputs[where : where + 1] = [label], [x[i].clone()]
        a.state["seen"] = a.state.get("seen", 0) + len(x)

    def _update(self, a: Adapter) -> None:
        with learning(a.net):
            logits = a.net(torch.stack(a.state["inputs"]))
        a.update(self.weight * entropy(logits).mean() / logits.shape[1])  # the authors' mean is over classes, too
