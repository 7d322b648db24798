"""Distances and plans between the neurons of two networks (Singh & Jaggi, NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ot
import torch
from torch import Tensor, nn

import uda
from uda_transport.batchnorm import BatchNorm
from uda_transport.chain import Layer


@dataclass
class Affine:
    """A layer as it acts, with the BatchNorm behind it folded in; float64.

    Attributes:
        weight: ``[n, in, *kernel]``; bias: ``[n]``.
        raw_bias: of the layer itself, zero without one ``[n]``; norm: statistics and scales of the BatchNorm, or None.
    """

    weight: Tensor
    bias: Tensor
    raw_bias: Tensor
    norm: BatchNorm | None


@torch.no_grad()
def folded(net: nn.Module, layer: Layer) -> Affine:
    """Weights of a layer such that ``W x + b`` is what comes out of the layer and its BatchNorm in evaluation."""
    module = net.get_submodule(layer.name)
    weight = (module.weight_vectors if layer.kind == "head" else module.weight).double()
    bias = getattr(module, "bias", None)
    raw = weight.new_zeros(len(weight)) if bias is None else bias.double()
    if layer.norm is None:
        return Affine(weight, raw, raw, None)
    norm = BatchNorm.of(net.get_submodule(layer.norm))
    scale = norm.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return Affine(weight * scale, norm.shift + norm.scale * raw, raw, norm)


def follow_inputs(weight: Tensor, plan: Tensor | None) -> Tensor:
    """``W T``: weights ``[n, in, ...]`` on the inputs as they stand in the reference network.

    A flattened map has ``s`` inputs for each of the ``m`` rows of the plan ``[m, m_ref]``, which move together.
    """
    if plan is None:
        return weight
    if weight.shape[1] == len(plan):
        return torch.einsum("ni...,ij->nj...", weight, plan)
    parts = weight.reshape(len(weight), len(plan), -1)
    return torch.einsum("nis,ij->njs", parts, plan).flatten(1)


def transport_plan(cost: Tensor) -> Tensor:
    """Exact plan ``[n, n_ref]`` between uniform marginals, as mass (entries sum to 1).

    Raises:
        UDAError: the solver did not finish.
    """
    n, m = cost.shape
    mass, log = ot.emd(
        np.full(n, 1 / n), np.full(m, 1 / m), np.ascontiguousarray(cost.numpy()), numItermax=10_000_000, log=True
    )
    if log.get("warning"):
        raise uda.UDAError(f"The transport between {n} and {m} neurons was not solved: {log['warning']}")
    return torch.from_numpy(mass)


def weight_cost(one: Affine, reference: Affine, plan: Tensor | None, squared: bool, normalise: bool) -> Tensor:
    """Distance of the neurons' incoming weights (and bias), once the inputs are aligned ``[n, n_ref]``."""

    def rows(weight: Tensor, bias: Tensor) -> Tensor:
        out = torch.cat([weight.flatten(1), bias[:, None]], dim=1)
        return nn.functional.normalize(out, dim=1) if normalise else out

    cost = torch.cdist(rows(follow_inputs(one.weight, plan), one.bias), rows(reference.weight, reference.bias))
    return cost.square() if squared else cost


@torch.no_grad()
def activation_costs(
    nets: Sequence[nn.Module], chains: Sequence[list[Layer]], samples: Tensor, squared: bool, normalise: bool
) -> list[list[Tensor]]:
    """Distance of the neurons' activations (before the nonlinearity, behind BatchNorm) over samples and positions.

    Returns:
        ``[net][layer]``: ``[n, n_ref]`` between each net and the first one. Batches are added up, and never kept.
    """
    total: list[list[list[Tensor]]] = []  # [net][layer]: inner products with the reference, squares of both
    for batch in samples.split(64):
        seen = [_activations(net, chain, batch) for net, chain in zip(nets, chains, strict=True)]
        new = [
            [[a @ r.T, a.square().sum(1), r.square().sum(1)] for a, r in zip(one, seen[0], strict=True)] for one in seen
        ]
        total = [
            [[x + y for x, y in zip(t, n, strict=True)] for t, n in zip(ts, ns, strict=True)]
            for ts, ns in zip(total or [[[0, 0, 0]] * len(one) for one in new], new, strict=True)
        ]

    def distance(inner: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        if normalise:
            norms = mine.sqrt().clamp_min(1e-300)[:, None] * theirs.sqrt().clamp_min(1e-300)
            cost = 2 - 2 * inner / norms
        else:
            cost = mine[:, None] + theirs - 2 * inner
        return cost.clamp_min(0) if squared else cost.clamp_min(0).sqrt()

    return [[distance(*parts) for parts in layers] for layers in total]


def _activations(net: nn.Module, chain: list[Layer], batch: Tensor) -> list[Tensor]:
    """``[n, samples * positions]`` of each layer with weights, float64."""
    seen: dict[str, Tensor] = {}
    names = [layer.norm or layer.name for layer in chain if layer.kind != "norm"]
    hooks = [
        net.get_submodule(n).register_forward_hook(lambda _m, _i, out, n=n: seen.__setitem__(n, out.detach()))
        for n in names
    ]
    try:
        net(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[n].double().transpose(0, 1).flatten(1) for n in names]
