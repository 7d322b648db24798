"""A mixture of low-rank experts behind a layer, each domain with a router of its own (BECoTTA's MoDE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from uda.nn import full, no_autocast
from uda_testtime.layers import channel_axis, per_sample, width


def expert_gates(logits: Tensor, top: int) -> Tensor:
    """Softmax of the ``top`` largest of router logits ``[B, E]``; zero elsewhere."""
    values, places = logits.topk(min(top, logits.shape[1]), 1)
    return torch.zeros_like(logits).scatter(1, places, values.softmax(1))


def mutual_information(routed: Tensor) -> Tensor:
    """Of domain and expert, from ``p(e | d)`` ``[D, E]``, domains alike: ``sum p(d, e) log p(d, e) / (p(d) p(e))``."""
    joint = routed / len(routed)
    entropies = [torch.special.entr(joint.sum(axis)).sum() for axis in (0, 1)]
    return sum(entropies) - torch.special.entr(joint).sum()


class MoDE(nn.Module):
    """``y + sum_e g_e E_e(y)`` of a layer's output ``y``: ``E_e = Linear(d, r), GELU, Linear(r, d)``, E of them.

    The router of the sample's domain sees the mean of ``y`` over positions; ``g`` is the softmax of its ``top`` largest
    logits. All experts are computed at once. The experts' second layers are zero at first, so that nothing changes.

    Attributes:
        domain: number of each sample's domain ``[B]``, told for a forward; None: all of domain 0.
        noise: a generator, while the routers learn: ``N(0, (softplus(noise logits) + 0.01)^2)`` on the logits.
        record: a list that takes ``softmax(logits)`` ``[B, E]`` of each forward, or None.
        compat: as the authors' released code routes: the first ``top`` experts in place of the chosen ones, with the
            first sample's weights, without a gradient.
    """

    def __init__(self, layer: nn.Module, domains: int, experts: int, rank: int, top: int, compat: bool = False) -> None:
        super().__init__()
        self.layer, self.top, self.compat, d = layer, top, compat, width(layer)
        like = next(layer.parameters())
        self.router = nn.Parameter(0.02 * torch.randn(domains, d, 2 * experts).to(like))
        self.down = nn.Parameter((torch.randn(d, experts, rank) / d**0.5).to(like))
        self.down_bias = nn.Parameter(torch.zeros(experts, rank).to(like))
        self.up = nn.Parameter(torch.zeros(experts, rank, d).to(like))
        self.up_bias = nn.Parameter(torch.zeros(experts, d).to(like))
        self.domain: Tensor | None = None
        self.noise: Generator | None = None
        self.record: list[Tensor] | None = None

    def own(self) -> list[nn.Parameter]:
        """Parameters of experts and routers."""
        return [self.router, self.down, self.down_bias, self.up, self.up_bias]

    def gates(self, pooled: Tensor) -> Tensor:
        """Weights of the experts ``[B, E]``, from ``[B, d]``."""
        with no_autocast(pooled):
            z = full(pooled)
            domain = torch.zeros(len(z), dtype=torch.long, device=z.device) if self.domain is None else self.domain
            domain = per_sample(domain, z)
            each = torch.einsum("bd,kde->bke", z, full(self.router))  # k routers are few: no copy a sample
            logits, spread = each[torch.arange(len(z), device=z.device), domain].chunk(2, 1)
            if self.noise is not None:
                draw = torch.randn(logits.shape, generator=self.noise).to(logits)
                logits = logits + draw * (F.softplus(spread) + 0.01)
            if self.record is not None:
                self.record.append((logits.detach() if self.compat else logits).softmax(1))
            return self._released(logits) if self.compat else expert_gates(logits, self.top)

    def _released(self, logits: Tensor) -> Tensor:
        values = logits[0].detach().topk(min(self.top, logits.shape[1])).values.softmax(0)
        return F.pad(values, (0, logits.shape[1] - len(values))).expand(len(logits), -1)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer."""
        y = self.layer(*args, **kwargs)
        axis = channel_axis(y, self.up.shape[2], "BECoTTA")
        t = y.movedim(axis, -1)
        g = self.gates(t.flatten(1, -2).mean(1) if t.dim() > 2 else t)
        g = g.to(t).view(len(t), *[1] * (t.dim() - 2), -1)
        h = F.gelu(F.linear(t, self.down.flatten(1).T.to(t), self.down_bias.flatten().to(t)))
        h = (h.unflatten(-1, self.down.shape[1:]) * g[..., None]).flatten(-2)
        out = F.linear(h, self.up.flatten(0, 1).T.to(t)) + g @ self.up_bias.to(t)
        return y + out.movedim(-1, axis)
