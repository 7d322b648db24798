"""A plain feed-forward network as a chain of layers, found by tracing; what is no chain is refused by name."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.nn import CosineHead, DomainBatchNorm, PerDomain, WeightNormHead

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
HEADS = (WeightNormHead, CosineHead)
#: Modules that treat each neuron or channel alike, by itself.
NEURONWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Sigmoid, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
)  # fmt: skip
POOLS = tuple(
    getattr(nn, f"{kind}Pool{d}d") for kind in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)
)
FUNCTIONS = {
    getattr(F, n) for n in ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish", "dropout")
} | {torch.relu, torch.tanh, torch.sigmoid, F.tanh, F.sigmoid}
POOL_FUNCTIONS = {
    getattr(F, f"{kind}_pool{d}d"): d for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)
}
METHODS = {"relu", "tanh", "sigmoid", "contiguous", "float"}


@dataclass(frozen=True)
class Layer:
    """One link of the chain.

    Attributes:
        name: of the module in the network; kind: ``linear``, ``conv``, ``head``, ``norm``.
        norm: name of the BatchNorm directly behind a ``linear`` or ``conv``; None where there is none.
    """

    name: str
    kind: str
    norm: str | None = None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        own = (*HEADS, DomainBatchNorm, PerDomain)
        return isinstance(m, own) or super().is_leaf_module(m, qualified_name)


def chain_of(net: nn.Module) -> list[Layer]:
    """The layers of a network in forward order.

    Args:
        net: Linear, ungrouped convolutions, BatchNorm, LayerNorm of flat features, elementwise activations, dropout,
            pooling and flattening, one after the other.

    Raises:
        UDAError: anything else, by the name of the module or operation: residual connections, attention, grouped or
            transposed convolutions, recurrent nets, BatchNorm by domain, control flow that depends on the data.
    """
    try:
        graph = _Tracer().trace(net)
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        raise _refusal(f"its forward cannot be followed ({type(error).__name__}: {told})") from error
    modules, layers = dict(net.named_modules()), []
    last, sizes, spatial, seen = None, set(), None, set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if last is None:
                last = node
            continue
        if node.op == "output":
            if node.all_input_nodes != [last]:
                raise _refusal("it has several outputs, or one from its middle")
            break
        if _is_size(node, sizes):
            sizes.add(node)
            continue
        inputs = [n for n in node.all_input_nodes if n not in sizes]
        what = _what(node, modules)
        if len(inputs) > 1:
            raise _refusal(f"{what} joins {len(inputs)} branches (a residual connection, or the like)")
        if inputs != [last]:
            raise _refusal(f"{what} takes its input from elsewhere than the layer before it")
        if node.op == "call_module":
            module = modules[node.target]
            if node.target in seen and list(module.parameters()):
                raise _refusal(f"{what} is used twice")
            seen.add(node.target)
            spatial = _take(module, node.target, layers, spatial, what, directly=last)
        else:
            spatial = _take_function(node, spatial, what)
        last = node
    if not any(layer.kind != "norm" for layer in layers):
        raise _refusal("it has no layer of weights")
    covered = {n for layer in layers for n in (layer.name, layer.norm) if n}
    for name in net.state_dict():
        if not any(name.startswith(f"{c}.") or c == "" for c in covered):
            raise _refusal(f"{name!r} belongs to none of its layers")
    return layers


def _take(
    module: nn.Module, name: str, layers: list[Layer], spatial: int | None, what: str, directly: fx.Node
) -> int | None:
    """Append the layer of a module, and tell how many spatial dimensions follow it (None: as the input)."""
    kind = type(module)
    if layers and layers[-1].kind == "head":
        raise _refusal(f"{what} stands behind the classifier")
    if kind is nn.Linear:
        layers.append(Layer(name, "linear"))
        return 0
    if kind in CONVOLUTIONS:
        if module.groups != 1:
            raise _refusal(f"{what} has {module.groups} groups")
        layers.append(Layer(name, "conv"))
        return CONVOLUTIONS[kind]
    if isinstance(module, HEADS):
        layers.append(Layer(name, "head"))
        return 0
    if isinstance(module, _BatchNorm):
        if module.running_mean is None:
            raise _refusal(f"{what} keeps no running statistics")
        if layers and layers[-1].kind in ("linear", "conv") and directly.target == layers[-1].name:
            layers[-1] = Layer(layers[-1].name, layers[-1].kind, name)
        else:
            layers.append(Layer(name, "norm"))
        return spatial
    if kind is nn.LayerNorm and len(module.normalized_shape) == 1 and spatial == 0:
        layers.append(Layer(name, "norm"))
        return spatial
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return 0
    if kind in POOLS and spatial in (None, int(kind.__name__[-2])):
        return spatial
    if isinstance(module, NEURONWISE):
        return spatial
    raise _refusal(f"{what} is none of the layers that can be fused")


def _take_function(node: fx.Node, spatial: int | None, what: str) -> int | None:
    args, options = node.args[1:], node.kwargs
    if node.target in (torch.flatten, "flatten"):
        given = dict(zip(("start_dim", "end_dim"), args, strict=False)) | dict(options)
        if (given.get("start_dim", 0), given.get("end_dim", -1)) == (1, -1):
            return 0
    elif node.target in ("view", "reshape", torch.reshape):
        if len(args) == 2 and args[1] == -1:
            return 0
    elif node.target in ("mean", torch.mean):
        dims = args[0] if args else options.get("dim")
        dims = {dims} if isinstance(dims, int) else set(dims or ())
        if spatial and dims and dims in ({2 + i for i in range(spatial)}, {-1 - i for i in range(spatial)}):
            return 0 if not (options.get("keepdim") or args[1:] == (True,)) else spatial
    elif node.target in POOL_FUNCTIONS:
        if spatial in (None, POOL_FUNCTIONS[node.target]):
            return spatial
    elif node.target in FUNCTIONS or (node.op == "call_method" and node.target in METHODS):
        return spatial
    raise _refusal(f"{what} is none of the operations that can be fused")


def _is_size(node: fx.Node, sizes: set[fx.Node]) -> bool:
    """Whether a node is a size of a tensor and not a tensor."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.target is getattr and node.args[1] == "shape":
        return True
    return node.target is operator.getitem and node.args[0] in sizes


def _what(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target!r} ({type(modules[node.target]).__name__})"
    if node.op == "get_attr":
        return f"the parameter {node.target!r}"
    where = next(iter(reversed(node.meta.get("nn_module_stack", {}).values())), None)
    inside = f" in {where[0]!r}" if where and where[0] else ""
    return f"the operation {getattr(node.target, '__name__', node.target)!r}{inside}"


def _refusal(reason: str) -> uda.UDAError:
    return uda.UDAError(
        f"This network cannot be fused: {reason}. Fusion takes plain chains: MLPs and CNNs of Linear, ungrouped "
        "convolutions, BatchNorm, activations, pooling and flattening, with no residual connection and no attention."
    )
