"""ViDA: low- and high-rank adapters beside the layers, weighed by how much the teacher's views disagree."""

from __future__ import annotations

import re
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full, no_autocast
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter
from uda_testtime.cotta import CoTTA
from uda_testtime.layers import hidden_layers, per_sample, told, wrap
from uda_testtime.parts import colour_view, keep_start, restore_at_random, seeded
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import mix_statistics
from uda_testtime.warmup import warm_up


def low_rank(layer: nn.Linear | nn.Conv2d, rank: int) -> nn.Sequential:
    """``U D`` beside a layer: D of N(0, rank^-4) with the layer's geometry, U pointwise and zero.

    ``rank`` is cut to the largest that the layer's weight can have.
    """
    out, fan_in = layer.weight.shape[0], layer.weight[0].numel()
    rank = min(rank, out, fan_in)
    if isinstance(layer, nn.Linear):
        down, up = nn.Linear(fan_in, rank, bias=False), nn.Linear(rank, out, bias=False)
    else:
        down = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, layer.dilation, bias=False,
            padding_mode=layer.padding_mode,
        )  # fmt: skip
        up = nn.Conv2d(rank, out, 1, bias=False)
    nn.init.normal_(down.weight, std=rank**-2.0)
    nn.init.zeros_(up.weight)
    return nn.Sequential(down, up).to(layer.weight)


class VidaLayer(nn.Module):
    """``layer(x) + low_scale U1 D1 x + high_scale U2 D2 x`` (ViDA, eq. 3).

    Attributes:
        low_scale, high_scale: of each sample ``[B]``, or of all; 1 unless told.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, low: int, high: int) -> None:
        super().__init__()
        self.layer, self.low, self.high = layer, low_rank(layer, low), low_rank(layer, high)
        self.low_scale: float | Tensor = 1.0
        self.high_scale: float | Tensor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        out = self.layer(x)
        for part, scale in ((self.low(x), self.low_scale), (self.high(x), self.high_scale)):
            if isinstance(scale, Tensor):
                scale = per_sample(scale, part).view(-1, *[1] * (part.dim() - 1))
            out = out + scale * part
        return out

    @torch.no_grad()
    def fold(self) -> None:
        """Add both products, at scale 1, to the layer's weight."""
        for down, up in (self.low, self.high):
            self.layer.weight += torch.einsum("or,r...->o...", up.weight.flatten(1), down.weight)


def adapters(net: nn.Module) -> list[nn.Parameter]:
    """Of all :class:`VidaLayer`."""
    layers = [m for m in net.modules() if isinstance(m, VidaLayer)]
    return [p for m in layers for part in (m.low, m.high) for p in part.parameters()]


def disagreement(logits: Tensor, kind: Literal["sample", "batch"] = "sample") -> Tensor:
    """Uncertainty ``[B]`` of ``[V, B, C]`` logits of V views.

    ``sample`` (eq. 4): ``sqrt(mean_v |p_v - mean p|^2)``, below 1. ``batch``, as in the authors' code: a tenth of the
    logits' variance over views, averaged over samples and classes, here at most 1.
    """
    with no_autocast(logits):
        z = full(logits)
        if kind == "batch":
            return (0.1 * z.var(0).mean()).clamp(max=1).expand(z.shape[1])
        p = z.softmax(2)
        return (p - p.mean(0)).square().sum(2).mean(0).sqrt()


class ViDA(CoTTA):
    """Homeostatic visual domain adapter (Liu et al., ICLR 2024).

    Adapters beside the Linear layers of attention modules, or, in a net without them, beside all Linear and ungrouped
    Conv2d layers but the classifier. The teacher's V views of a sample give its uncertainty u (:func:`disagreement`);
    its adapters count ``(low, high) = (1 - u, 1 + u)`` where ``u >= threshold``, else ``(1 + u, 1 - u)`` (eq. 5), in
    net and teacher alike. Loss: CoTTA's, between both on the sample itself. All parameters are trained, the adapters at
    a rate of their own. Before the stream the adapters alone learn on labelled source samples.

    Scored: the teacher's logits before its average moves.

    Args:
        lr: of the model (1e-4 CIFAR-10-C, SGD 5e-7 ImageNet-C); adapter_lr: of the adapters (1e-5, 2e-7);
            optimizer: ``adam`` or ``sgd``; weight, loss: as in :class:`CoTTA`.
        low_rank, high_rank: of the adapters, cut to what a layer can have.
        views: so many, at least two; 0: none, and scales of 1. threshold: theta. uncertainty: ``sample`` (paper) or
            ``batch`` (the authors' code). flip: views may be mirrored.
        momentum, adapter_momentum: of the teacher (0.999 and 0.8 ImageNet-C).
        restore: probability of each weight to go back (0.1 CIFAR-C, 0 ImageNet-C).
        epochs, source_lr, batch_size: of the warm-up by Adam; 0 epochs: none.
        source_weight: share of the source's BatchNorm statistics.

    Raises:
        UDAError: no layer beside the classifier, or an argument out of range.
    """

    needs = "labels"

    def __init__(
        self, lr: float = 1e-4, adapter_lr: float = 1e-5, optimizer: str = "adam", weight: float = 1.0,
        low_rank: int = 1, high_rank: int = 128, views: int = 10, threshold: float = 0.2,
        uncertainty: Literal["sample", "batch"] = "sample", flip: bool = True, momentum: float = 0.999,
        adapter_momentum: float = 0.999, restore: float = 0.1, loss: Literal["ce", "symmetric"] = "ce",
        epochs: int = 3, source_lr: float = 1e-3, batch_size: int = 64, source_weight: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, threshold, views, flip, momentum, restore, loss, source_weight)
        if uncertainty not in ("sample", "batch"):
            raise UDAError(f"ViDA: uncertainty is 'sample' or 'batch', not {uncertainty!r}.")
        if views < 0 or views == 1 or min(low_rank, high_rank) < 1:
            given = f"{views}, {low_rank}, {high_rank}"
            raise UDAError(f"ViDA: views are 0 or at least two, both ranks at least 1, not {given}.")
        self.adapter_lr, self.low_rank, self.high_rank = adapter_lr, low_rank, high_rank
        self.uncertainty, self.adapter_momentum = uncertainty, adapter_momentum
        self.epochs, self.source_lr, self.batch_size = epochs, source_lr, batch_size

    def attach(self, a: Adapter) -> None:
        """Adapters, batch statistics, a teacher."""
        found = {n: m for n, m in hidden_layers(a.net, a.head).items() if getattr(m, "groups", 1) == 1}
        attention = [n for n, m in a.net.named_modules() if re.search("Attention", type(m).__name__)]
        inside = {n: m for n, m in found.items() if n.startswith(tuple(f"{outer}." for outer in attention))}
        if not found:
            raise UDAError("ViDA: the model has no Linear or Conv2d beside its classifier to put adapters at.")
        with seeded(a):
            wrap(a, inside or found, lambda layer: VidaLayer(layer, self.low_rank, self.high_rank))
        mix_statistics(a, self.source_weight)
        a.add("teacher", EMATeacher(a.net, buffers="none"))
        self._train(a)

    def _train(self, a: Adapter) -> None:
        own = adapters(a.net)
        ids = {id(p) for p in own}
        rest = [p for p in a.net.parameters() if id(p) not in ids]
        a.train_parameters(
            [{"params": rest, "lr": self.lr}, {"params": own, "lr": self.adapter_lr}], self.optimizer, self.lr
        )
        keep_start(a)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """The adapters learn on the source; net, teacher and what weights go back to start from there."""
        warm_up(
            a, source, adapters(a.net), lambda x, y: F.cross_entropy(a.net(x), y), self.epochs, self.source_lr,
            self.batch_size,
        )  # fmt: skip
        a.extra["teacher"].update(a.net, 0.0)
        self._train(a)

    @torch.no_grad()
    def scales(self, a: Adapter, x: Tensor) -> dict[str, Tensor]:
        """What each sample's adapters count (eq. 5)."""
        if not self.views:
            return {}
        teacher = a.extra["teacher"]
        views = torch.stack([teacher(colour_view(a, x, self.flip)) for _ in range(self.views)])
        u = disagreement(views, self.uncertainty)
        signed = torch.where(u >= self.threshold, u, -u)
        return {"low_scale": 1 - signed, "high_scale": 1 + signed}

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits."""
        with told(VidaLayer, a.extra["teacher"], **self.scales(a, x)):
            return a.extra["teacher"](x)

    @torch.no_grad()
    def settle(self, a: Adapter) -> None:
        """Move the teacher, model and adapters each by their momentum; then restore."""
        (teacher,), net = a.extra["teacher"].copies, a.net
        own = {"mine": adapters(teacher), "theirs": adapters(net)}
        ids = {id(p) for p in own["mine"]} | {id(p) for p in own["theirs"]}
        rest = [[p for p in m.parameters() if id(p) not in ids] for m in (teacher, net)]
        torch._foreach_lerp_(rest[0], rest[1], 1 - self.momentum)
        torch._foreach_lerp_(own["mine"], own["theirs"], 1 - self.adapter_momentum)
        restore_at_random(a, list(a.extra["start"]), self.restore)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits, and one step of the net towards them."""
        teacher = a.extra["teacher"]
        with told(VidaLayer, a.net, teacher, **self.scales(a, x)):
            with torch.no_grad():
                target = teacher(x)
            logits = a.net(x)
        a.update(self.objective(a, target, logits))
        self.settle(a)
        return target
