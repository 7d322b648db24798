"""Where attention goes: squeeze-and-excitation layers, residual blocks, stages, or the features."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import uda
from uda.errors import check_choice, nearest
from uda.nn import PerDomain, feature_size
from uda_conditioned.attention import ChannelAttention, ConditionedLayer

PLACES = ("auto", "se", "blocks", "stages", "features")
_PASSIVE = re.compile("Pool|Drop|Identity|Flatten|Pad|Downsample|Upsample")
_SQUEEZE = (("fc1", "fc2"), ("conv_reduce", "conv_expand"))


@dataclass
class Call:
    """A module that ran in the dry forward: name, output shape, and how often it was called."""

    module: nn.Module
    shape: tuple[int, ...]
    calls: int = 1


def trace(backbone: nn.Module, input_shape: Sequence[int]) -> dict[str, Call]:
    """Modules of a backbone by name, in the order in which they end in a dry forward; ``""`` is the backbone."""
    found: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                calls = found.pop(name).calls + 1 if name in found else 1
                found[name] = Call(module, tuple(output.shape), calls)

        return hook

    hooks = [m.register_forward_hook(note(name)) for name, m in backbone.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"):  # the network is about to change: compile it after that
            feature_size(backbone, input_shape)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def squeezes(backbone: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """``(module, attribute, name)`` of the first layer of each squeeze-and-excitation module."""
    found = []
    for name, module in backbone.named_modules():
        if not re.search("SE|Squeeze", type(module).__name__):
            continue
        for first, second in _SQUEEZE:
            a, b = getattr(module, first, None), getattr(module, second, None)
            if isinstance(a, (nn.Linear, nn.Conv2d)) and isinstance(b, (nn.Linear, nn.Conv2d)):
                found.append((module, first, name))
    return found


def block_points(calls: dict[str, Call]) -> list[str]:
    """The last normalisation of each residual block, before the skip connection is added (ResNets)."""
    found = []
    for name, call in calls.items():
        if hasattr(call.module, "downsample") and hasattr(call.module, "conv2"):
            norms = [f"{name}.bn{i}" for i in (3, 2) if isinstance(getattr(call.module, f"bn{i}", None), nn.Module)]
            found += [n for n in norms[:1] if n in calls and calls[n].calls == 1]
    return found


def stage_points(calls: dict[str, Call]) -> list[str]:
    """The last layer at each spatial resolution; pooling and dropout do not count."""
    last: dict[tuple[int, ...], str] = {}
    for name, call in calls.items():
        if not name or call.calls > 1 or not _attachable(call) or len(call.shape) != 4 or max(call.shape[2:]) == 1:
            continue
        if _PASSIVE.search(type(call.module).__name__):
            continue
        # a layer inside of a block that changes the resolution is no end of a stage
        parents = [calls.get(name[:i]) for i, letter in enumerate(name) if letter == "."]
        blocks = [p for p in parents if p and len(p.shape) == 4 and not isinstance(p.module, nn.Sequential)]
        if all(p.shape[2:] == call.shape[2:] for p in blocks):
            last.pop(call.shape[2:], None)
            last[call.shape[2:]] = name
    return list(last.values())


def feature_points(calls: dict[str, Call]) -> list[str]:
    """Activations between rows of features; without any, the backbone's own output (``""``)."""
    rows = [
        name for name, call in calls.items()
        if len(call.shape) == 2 and call.calls == 1 and type(call.module).__module__ == "torch.nn.modules.activation"
    ]  # fmt: skip
    return rows or [""]


def _attachable(call: Call) -> bool:
    """A container that walks its children in a forward of its own would run the attention by itself."""
    if isinstance(call.module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return not isinstance(call.module, nn.Sequential) or type(call.module).forward is nn.Sequential.forward


def find_points(backbone: nn.Module, input_shape: Sequence[int], where: str | Sequence[str]) -> list[str] | None:
    """Names of the modules whose output gets attention, or None for the backbone's own squeeze-and-excitation layers.

    Raises:
        uda.UDAError: an unknown place, a name that is no module or not usable, or nothing found.
    """
    if isinstance(where, str):
        check_choice("Channel attention", "place", where, PLACES)
    if where in ("auto", "se") and squeezes(backbone):
        return None
    calls = trace(backbone, input_shape)
    if not isinstance(where, str):
        for name in where:
            call = calls.get(name)
            if call is None:
                raise uda.UDAError(f"The backbone has no layer {name!r} to attend to. {nearest(name, list(calls))}")
            if call.calls > 1 or len(call.shape) not in (2, 4) or not _attachable(call):
                raise uda.UDAError(
                    f"Layer {name!r} ({type(call.module).__name__}) cannot get channel attention: it must run once in "
                    "a forward, give [B, C, H, W] or [B, C], and be no bare container."
                )
        return list(where)
    tokens = any(len(c.shape) == 3 for c in calls.values())  # a transformer: it has no channels to attend to
    places = {
        "blocks": [] if tokens else block_points(calls),
        "stages": [] if tokens else stage_points(calls),
        "features": feature_points(calls) if not tokens else [""],
    }
    found = next((p for p in places.values() if p), []) if where == "auto" else places.get(where, [])
    if not found:
        raise uda.UDAError(
            f"{type(backbone).__name__} has no place {where!r} for channel attention: use 'auto', or name its layers."
        )
    return found


def _attend(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return module.conditioned(output)


def condition(
    backbone: nn.Module, input_shape: Sequence[int], where: str | Sequence[str], reduction: int, gated: bool
) -> list[str]:
    """Make the attention of a backbone depend on the domain, in place; returns the names of the places.

    A squeeze-and-excitation module keeps its weights and gets a first layer for each domain. Elsewhere
    :class:`~uda_conditioned.attention.ChannelAttention` is added; names of the layers that were there stay. A backbone
    that is conditioned already is left as it is.
    """
    if isinstance(backbone, PerDomain):
        raise uda.UDAError("Channel attention by domain needs one backbone, and PerDomain has one for each.")
    if any(isinstance(m, ConditionedLayer) for m in backbone.modules()):
        return []
    names = find_points(backbone, input_shape, where)
    if names is None:
        found = squeezes(backbone)
        for module, attribute, _ in found:
            setattr(module, attribute, ConditionedLayer(getattr(module, attribute), gated))
        return [name for _, _, name in found]
    calls = trace(backbone, input_shape)
    for name in names:
        channels = calls[name].shape[1]
        module = backbone.get_submodule(name)
        attention = ChannelAttention(channels, max(channels // reduction, min(channels, 8)), gated)
        if (parameter := next(backbone.parameters(), None)) is not None:
            attention.to(parameter.device)
        module.add_module("conditioned", attention)
        if not isinstance(module, nn.Sequential):  # a Sequential runs it as its last layer
            module.register_forward_hook(_attend)
    return names
