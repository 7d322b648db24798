"""Model Fusion via Optimal Transport (Singh & Jaggi, NeurIPS 2020): align neurons layer by layer, then average."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import uda
from uda.errors import check_choice
from uda_transport.batchnorm import BatchNorm, averaged, mean_norm, recalibrate, write_alone, write_behind
from uda_transport.chain import Layer, chain_of
from uda_transport.neurons import Affine, activation_costs, folded, follow_inputs, transport_plan, weight_cost


@torch.no_grad()
def fuse_modules(
    nets: Sequence[nn.Module],
    weights: Sequence[float] | None = None,
    metric: str = "weights",
    samples: Tensor | None = None,
    squared: bool = False,
    normalise: bool = False,
    incoming: str = "marginal",
    batchnorm: str = "fold",
    align: bool = True,
) -> nn.Module:
    """One network from several trained ones (Singh & Jaggi 2020, algorithm 1).

    Neurons of every network are transported to those of the first, layer by layer: with the inputs of layer l aligned
    by the plan of layer l - 1, ``W^ = W T diag(1/beta)``, an exact plan ``T`` between uniform marginals is sought for
    the distance of neurons, and ``W~ = diag(1/beta) T' W^`` is averaged with the first network's weights. The classes
    of the last layer stand fixed. More than two networks are all aligned to the first and averaged at once.
    The paper has neither biases nor BatchNorm: here a bias is one more incoming weight, and BatchNorm is folded into
    the layer before it for distances and averages, then written back (see :mod:`uda_transport.batchnorm`).

    Args:
        nets: chains of equal structure (see :func:`~uda_transport.chain.chain_of`), in the reference's order of layers;
            their widths may differ, and the result has those of the first.
        weights: of the networks in the average, positive with sum 1; None: equal.
        metric: ``weights`` (data-free) or ``activations`` on ``samples``.
        samples: inputs ``[S, ...]`` without labels, for ``activations`` and ``recalibrate``; the paper: S = 200.
        squared: squared distances; normalise: neurons of unit length in the distance.
        incoming: plan for the incoming weights: ``marginal`` (the paper) averages the neurons that fall on one
            reference neuron, ``mass`` adds them up, so that a wider network keeps its function; alike where widths are.
        batchnorm: ``fold``: exactly the average of the folded weights; ``recalibrate``: then new running statistics
            from ``samples`` (Jordan et al., *REPAIR*, ICLR 2023), against activations that shrink in the average.
        align: False: plain averaging, neuron by neuron.

    Returns:
        A copy of the first network with fused weights, in evaluation mode.

    Raises:
        UDAError: a network that is no such chain, unlike structures, wrong weights, samples missing.
    """
    shares = _shares(weights, len(nets))
    check_choice("Fusion", "metric", metric, ("weights", "activations"))
    check_choice("Fusion", "incoming", incoming, ("marginal", "mass"))
    check_choice("Fusion", "batchnorm", batchnorm, ("fold", "recalibrate"))
    if samples is None and (metric == "activations" or batchnorm == "recalibrate"):
        raise uda.UDAError("Fusion by activations, and recalibration of BatchNorm, need samples.")
    nets = [copy.deepcopy(net).cpu().eval() for net in nets]
    chains = [chain_of(net) for net in nets]
    _check_alike(nets, chains, widths=align)
    samples = None if samples is None else samples.cpu()
    costs = activation_costs(nets, chains, samples, squared, normalise) if metric == "activations" and align else None
    fused = copy.deepcopy(nets[0])
    ends = max(i for i, layer in enumerate(chains[0]) if layer.kind != "norm")
    inputs: list[Tensor | None] = [None] * len(nets)  # plans that the inputs of the next layer follow
    outputs: list[Tensor | None] = [None] * len(nets)  # the same as means over neurons, for what belongs to neurons
    number = 0
    for i, reference in enumerate(chains[0]):
        if reference.kind == "norm":
            alone = [_neurons(n.get_submodule(c[i].name), p) for n, c, p in zip(nets, chains, outputs, strict=True)]
            write_alone(fused.get_submodule(reference.name), mean_norm(alone, shares))
            continue
        parts = [folded(net, chain[i]) for net, chain in zip(nets, chains, strict=True)]
        moved = [parts[0]]
        for k in range(1, len(nets)):
            plan = None
            if align and i != ends:
                cost = costs[k][number] if costs else weight_cost(parts[k], parts[0], inputs[k], squared, normalise)
                plan = transport_plan(cost)
            aligned = follow_inputs(parts[k].weight, inputs[k])
            if plan is None:
                inputs[k] = outputs[k] = None
                moved.append(Affine(aligned, parts[k].bias, parts[k].raw_bias, parts[k].norm))
                continue
            outputs[k] = plan / plan.sum(0)
            inputs[k] = outputs[k] if incoming == "marginal" else plan / plan.sum(1, keepdim=True)
            rows, norm = outputs[k].T, parts[k].norm
            moved.append(Affine(
                torch.einsum("ji,i...->j...", rows, aligned), rows @ parts[k].bias, rows @ parts[k].raw_bias,
                None if norm is None else norm.moved(rows),
            ))  # fmt: skip
        _write(fused, reference, moved, shares)
        number += 1
    if batchnorm == "recalibrate":
        recalibrate(fused, samples)
    return fused


def _shares(weights: Sequence[float] | None, n: int) -> list[float]:
    if n < 2:
        raise uda.UDAError(f"Fusion takes two networks or more, not {n}.")
    shares = [1 / n] * n if weights is None else [float(w) for w in weights]
    if len(shares) != n or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise uda.UDAError(f"Fusion of {n} networks takes {n} weights, none negative, of sum 1, not {shares}.")
    return shares


def _check_alike(nets: Sequence[nn.Module], chains: Sequence[list[Layer]], widths: bool) -> None:
    """Equal kinds of layers, kernels, inputs and outputs; equal widths where nothing is aligned."""

    def form(net: nn.Module, layer: Layer, first: bool, last: bool) -> str:
        module = net.get_submodule(layer.name)
        norm = None if layer.norm is None else type(net.get_submodule(layer.norm)).__name__
        parts = [type(module).__name__, norm and f"then {norm}"]
        parts += [f"{a} {v}" for a in ("stride", "padding", "dilation") if (v := getattr(module, a, None)) is not None]
        if layer.kind != "norm":
            n, m, *kernel = (module.weight_vectors if layer.kind == "head" else module.weight).shape
            parts += [kernel and f"kernel {kernel}", (first or not widths) and f"{m} inputs"]
            parts += [(last or not widths) and f"{n} outputs", getattr(module, "bias", None) is not None and "bias"]
        return ", ".join(p for p in parts if p)

    weighted = [i for i, layer in enumerate(chains[0]) if layer.kind != "norm"]
    for number, (net, chain) in enumerate(zip(nets[1:], chains[1:], strict=True), start=2):
        if len(chain) != len(chains[0]):
            raise uda.UDAError(f"Network {number} has {len(chain)} layers, the first has {len(chains[0])}.")
        for i, (mine, theirs) in enumerate(zip(chains[0], chain, strict=True)):
            ends = i == weighted[0], i == weighted[-1]
            if (a := form(nets[0], mine, *ends)) != (b := form(net, theirs, *ends)):
                raise uda.UDAError(
                    f"Networks {number} and 1 cannot be fused: layer {theirs.name!r} of network {number} is {b}; "
                    f"{mine.name!r} of the first is {a}."
                )


def _neurons(module: nn.Module, plan: Tensor | None) -> BatchNorm:
    """A norm that stands alone, with its neurons moved."""
    norm = BatchNorm.of(module)
    if plan is None:
        return norm
    n = len(norm.gain)
    rows = plan.T if n == len(plan) else torch.kron(plan.T.contiguous(), torch.eye(n // len(plan), dtype=plan.dtype))
    return norm.moved(rows)


@torch.no_grad()
def _write(net: nn.Module, layer: Layer, parts: list[Affine], shares: list[float]) -> None:
    """Put the average into a layer of the fused network."""
    module = net.get_submodule(layer.name)
    weight, bias, raw = (averaged([getattr(p, n) for p in parts], shares) for n in ("weight", "bias", "raw_bias"))
    if layer.norm is not None:
        raw = raw if module.bias is not None else torch.zeros_like(raw)
        norm = mean_norm([p.norm for p in parts], shares)
        weight, bias = write_behind(net.get_submodule(layer.norm), norm, weight, bias, raw), raw
    if layer.kind != "head":
        module.weight.copy_(weight)
    elif hasattr(module, "direction"):
        module.direction.copy_(weight)
        module.length.copy_(weight.norm(dim=1, keepdim=True))
    else:
        module.weight.copy_(weight)
    if getattr(module, "bias", None) is not None:
        module.bias.copy_(bias)
