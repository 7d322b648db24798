"""BatchNorm layers that mix source and batch statistics, put in and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from uda.nn import full, no_autocast

if TYPE_CHECKING:
    from uda_testtime.adapter import Adapter

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)


class MixedNorm(nn.Module):
    """A BatchNorm with statistics ``w * source + (1 - w) * batch``; its running statistics never move.

    Args:
        norm: the layer, kept as it is.
        source_weight: w in [0, 1], the share of the **source**: 1 is the trained net, 0 the batch alone. With one value
            a channel (a single sample after pooling) there are no batch statistics, and the source's are used.
    """

    def __init__(self, norm: _BatchNorm, source_weight: float) -> None:
        super().__init__()
        self.norm, self.source_weight = norm, source_weight

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, ...] -> [B, C, ...]``."""
        n, w = self.norm, self.source_weight
        if w == 1 or x.numel() == x.shape[1]:
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        if w == 0:
            return F.batch_norm(x, None, None, n.weight, n.bias, True, 0.0, n.eps)
        with no_autocast(x):
            z = full(x)
            axes = [0, *range(2, z.dim())]
            mean = w * n.running_mean + (1 - w) * z.mean(axes)
            var = w * n.running_var + (1 - w) * z.var(axes, correction=0)
            shape = [1, -1, *[1] * (z.dim() - 2)]
            out = (z - mean.view(shape)) * torch.rsqrt(var.view(shape) + n.eps)
            if n.weight is not None:
                out = out * n.weight.view(shape) + n.bias.view(shape)
        return out.to(x.dtype)


def replace_modules(
    net: nn.Module, pick: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]
) -> dict[str, nn.Module]:
    """Put ``make(layer)`` in the place of each layer below ``net`` that is picked, in place.

    Returns:
        The layers as they were, by name: for :func:`undo`. A new layer is not searched.
    """
    found: dict[str, nn.Module] = {}

    def walk(parent: nn.Module, prefix: str) -> None:
        for name, child in list(parent.named_children()):
            if pick(child):
                found[prefix + name] = child
                setattr(parent, name, make(child))
            else:
                walk(child, f"{prefix}{name}.")

    walk(net, "")
    return found


def undo(net: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put the layers of one surgery back: they are the objects that they were.

    What took a layer's place and has a method ``fold()`` writes into the layer first what it can of what it learned.
    """
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        fold = getattr(net.get_submodule(name), "fold", None)
        if callable(fold):
            fold()
        setattr(net.get_submodule(parent), last, layer)


def has_statistics(layer: nn.Module) -> bool:
    """A BatchNorm with running statistics."""
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def mix_statistics(a: Adapter, source_weight: float) -> int:
    """A :class:`MixedNorm` around each BatchNorm of an adapter's net; how many there are."""
    return a.replace(has_statistics, lambda layer: MixedNorm(layer, source_weight))


def norm_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Normalisation layers by name, in the order of the modules: towards the output, as a rule."""
    return {n: m for n, m in net.named_modules() if isinstance(m, NORMS)}


def norm_parameters(net: nn.Module, skip: Collection[str] = ()) -> list[nn.Parameter]:
    """Scale and shift of all normalisation layers but those named in ``skip``."""
    layers = [m for n, m in norm_layers(net).items() if n not in skip]
    return [p for m in layers for p in (m.weight, m.bias) if p is not None]
