"""Where adapters go in a net, and how a forward tells them what it knows of its samples."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from uda.errors import UDAError
from uda_testtime.surgery import NORMS

if TYPE_CHECKING:
    from uda_testtime.adapter import Adapter

RESIDUAL = re.compile("Block|Bottleneck|Residual|MBConv")  # how libraries call the classes of residual blocks


def called(net: nn.Module, layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of some layers that are called: without the layers of torch's own transformer, which it reads."""
    read = {id(child) for m in net.modules() if isinstance(m, nn.TransformerEncoderLayer) for child in m.children()}
    return {name: m for name, m in layers.items() if id(m) not in read}


def hidden_layers(net: nn.Module, head: str | None) -> dict[str, nn.Module]:
    """Linear and Conv2d layers by name, without the classifier ``head``.

    Subclasses and parametrised layers are left out, and the layers of torch's own transformer, whose weights are read
    without a call.
    """
    inside = f"{head}."
    return called(net, {
        name: m for name, m in net.named_modules()
        if type(m) in (nn.Linear, nn.Conv2d) and name != head and not name.startswith(inside)
    })  # fmt: skip


def width(module: nn.Module) -> int:
    """Channels that come out: of the module's last Linear, Conv2d or normalisation layer; 0: it has none."""
    for m in reversed(list(module.modules())):
        if isinstance(m, nn.Linear):
            return m.out_features
        if isinstance(m, nn.Conv2d):
            return m.out_channels
        if isinstance(m, NORMS):
            shape = getattr(m, "normalized_shape", None)
            return int(shape[-1]) if shape is not None else getattr(m, "num_features", None) or m.num_channels
    return 0


def residual_blocks(net: nn.Module, head: str | None) -> dict[str, nn.Module]:
    """Outermost modules whose class is named as residual blocks are, by name; none around the classifier ``head``."""
    found: dict[str, nn.Module] = {}
    for name, m in net.named_modules():
        around = f"{head}.".startswith(f"{name}.") if name else True
        below = any(name.startswith(f"{outer}.") for outer in found)
        if not around and not below and RESIDUAL.search(type(m).__name__) and width(m):
            found[name] = m
    return found


def named_layers(net: nn.Module, names: list[str], who: str) -> dict[str, nn.Module]:
    """The modules of these names, each with a width."""
    known = dict(net.named_modules())
    for name in names:
        if not name or name not in known or not width(known[name]):
            told_of = ", ".join(n for n, m in known.items() if n and width(m))
            raise UDAError(f"{who}: the model has no layer {name!r} with weights. It has {told_of[:400]}.")
    return {name: known[name] for name in names}


def channel_axis(x: Tensor, channels: int, who: str) -> int:
    """The axis of the channels: 1 of ``[B, C, H, W]``, the last of ``[B, C]``, ``[B, N, C]`` or ``[B, H, W, C]``."""
    for axis in (1, 3) if x.dim() == 4 else (x.dim() - 1, 1):
        if x.shape[axis] == channels:
            return axis
    raise UDAError(f"{who}: {channels} channels were expected, not the shape {tuple(x.shape)}: name other layers.")


def per_sample(value: Tensor, x: Tensor) -> Tensor:
    """``[B, ...]`` beside ``x`` ``[n B, ...]``, each row n times: windows of an image follow each other."""
    value = value.to(x) if value.is_floating_point() else value.to(x.device)
    return value if len(value) == len(x) else value.repeat_interleave(len(x) // len(value), 0)


@contextmanager
def told(kind: type[nn.Module], *nets: nn.Module, **values: Any) -> Iterator[None]:
    """Inside, all modules of a class below the nets have these attributes; outside those that they had."""
    found = [m for net in nets for m in net.modules() if isinstance(m, kind)]
    before = [{name: getattr(m, name) for name in values} for m in found]

    def give(m: nn.Module, given: dict[str, Any]) -> None:
        for name, value in given.items():
            setattr(m, name, value)

    try:
        for m in found:
            give(m, values)
        yield
    finally:
        for m, given in zip(found, before, strict=True):
            give(m, given)


def wrap(a: Adapter, layers: dict[str, nn.Module], make: Callable[[nn.Module], nn.Module]) -> int:
    """Put ``make(layer)`` in the place of each of these layers of an adapter's net, in the net's order; how many.

    Raises:
        UDAError: layers lie inside each other.
    """
    chosen = {id(m) for m in layers.values()}
    if (count := a.replace(lambda m: id(m) in chosen, make)) < len(chosen):
        raise UDAError(f"Of the layers {', '.join(layers)} some lie inside others: name one or the other.")
    return count


def first_inputs(net: nn.Module) -> tuple[bool, int]:
    """Whether the first layer with weights is a convolution, and the inputs or channels that it takes."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            return True, m.in_channels
        if isinstance(m, nn.Linear):
            return False, m.in_features
    raise UDAError("The model has no Linear or Conv2d.")
