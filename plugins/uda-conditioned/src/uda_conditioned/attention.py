"""Channel attention with a branch for each domain, and the choice between two branches and one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.nn import active_domain


def moments(z: Tensor) -> Tensor:
    """``[n, mean, variance]`` over all n entries of a tensor, float32, without gradient."""
    z = z.detach().float()
    variance, mean = torch.var_mean(z, correction=0)
    return torch.stack([mean.new_tensor(float(z.numel())), mean, variance])


def merge(parts: Tensor) -> Tensor:
    """:func:`moments` of the union of samples from those of its parts, ``[P, ..., 3] -> [..., 3]``."""
    n, mean, variance = parts.unbind(-1)
    total = n.sum(0)
    share = n / total.clamp_min(1)
    joint = (share * mean).sum(0)
    return torch.stack([total, joint, (share * (variance + (mean - joint) ** 2)).sum(0)], dim=-1)


def domain_gap(source: Tensor, target: Tensor, eps: float = 1e-5) -> Tensor:
    """How far the domains' channel descriptors are apart, in [0, 1): ``tanh(|r_s - r_t| / |r_t|)``.

    ``r = mean / sqrt(variance + eps)`` of all entries of a domain's descriptors (Li et al., 2022).

    Args:
        source: mean and variance ``[..., 2]``; target: ``[..., 2]``.
    """
    r_s, r_t = (x[..., 0] / torch.sqrt(x[..., 1] + eps) for x in (source, target))
    return torch.tanh((r_s - r_t).abs() / r_t.abs().clamp_min(1e-12))


class ConditionedLayer(nn.Module):
    """A Linear or 1x1 convolution with one set of weights for the sources and one for the target.

    Both start from the given layer. The domain is that of :func:`uda.nn.active_domain`; in a joint forward each row
    goes through the layer of its domain. Held-out samples, and inputs outside of any domain, are the target's.

    Args:
        layer: ``nn.Linear`` or a 1x1 ``nn.Conv2d``.
        gated: keep a decision ``shared``, whether the target goes through the sources' weights, and note the moments
            of the inputs on which :meth:`decide` is based.
    """

    moments: Tensor
    steps: Tensor
    shared: Tensor

    def __init__(self, layer: nn.Module, gated: bool = False) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear) and not (
            isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
        ):
            raise uda.UDAError(f"A conditioned layer is a Linear or a plain 1x1 Conv2d, not {layer}.")
        self.target, self.source, self.gated = layer, copy.deepcopy(layer), gated
        if gated:
            device = layer.weight.device
            self.register_buffer("moments", torch.zeros(2, 2, device=device))  # source, target: mean, variance
            self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))
            self.register_buffer("shared", torch.zeros((), dtype=torch.bool, device=device))
        self._seen: dict[str, Tensor] = {}  # of this step; empty between steps

    def forward(self, z: Tensor) -> Tensor:
        """``[B, ...] -> [B, ...]`` as the layer, each row by its domain."""
        domain = active_domain()
        if domain is None or domain.role != "joint":
            return self._branch(z, "target" if domain is None else domain.role)
        counts = [rows for _, _, rows in domain.parts]
        if sum(counts) != len(z):
            raise uda.UDAError(
                f"Channel attention by domain got {len(z)} rows in a joint forward of {sum(counts)} samples: set "
                "model.forward_mode to 'separate'."
            )
        parts = zip(z.split(counts), domain.parts, strict=True)
        return torch.cat([self._branch(part, role) for part, (_, role, _) in parts])

    def _branch(self, z: Tensor, role: str) -> Tensor:
        if self.gated and self.training and torch.is_grad_enabled() and role in ("source", "target"):
            new = moments(z)
            self._seen[role] = merge(torch.stack([self._seen[role], new])) if role in self._seen else new
        if role == "source":
            return self.source(z)
        if not self.gated:
            return self.target(z)
        # a choice of weights, not of layers: no wait for the device, and each parameter has a gradient in each step
        weight = torch.where(self.shared, self.source.weight, self.target.weight)
        bias = None
        if self.target.bias is not None:
            bias = torch.where(self.shared, self.source.bias, self.target.bias)
        return F.linear(z, weight, bias) if weight.ndim == 2 else F.conv2d(z, weight, bias)

    def take_seen(self) -> Tensor:
        """Moments ``[2, 3]`` of source and target since the last call (n = 0: none), and forget them."""
        none = torch.zeros(3, device=self.target.weight.device)
        found = [self._seen.pop(role, none) for role in ("source", "target")]
        return torch.stack(found)


@torch.no_grad()
def decide(layers: list[ConditionedLayer], seen: Tensor, threshold: float, momentum: float) -> None:
    """Update the running moments and the decision of each layer.

    Args:
        seen: moments ``[M, 2, 3]`` of this step for the M layers, equal on all ranks.
        threshold: domains with a :func:`domain_gap` below it share the sources' weights.
        momentum: of the running moments; 0 decides by the last step alone.
    """
    old = torch.stack([layer.moments for layer in layers])
    first = torch.stack([layer.steps for layer in layers]) == 0
    weight = torch.where(first, 0.0, momentum)[:, None, None]
    both = (seen[..., 0] > 0).all(1)
    new = torch.where(both[:, None, None], weight * old + (1 - weight) * seen[..., 1:], old)
    shared = domain_gap(new[:, 0], new[:, 1]) < threshold
    for i, layer in enumerate(layers):
        layer.moments.copy_(new[i])
        layer.steps.add_(both[i])
        layer.shared.copy_(torch.where(both[i], shared[i], layer.shared))


class ChannelAttention(nn.Module):
    """Squeeze and excitation (Hu et al., 2018) whose first layer belongs to a domain (Li et al., 2020).

    ``x * 2 sigmoid(W2 relu(W_d z))`` with z the mean over positions. W2 starts at zero, so that a (pretrained)
    network that never had attention starts as it is.

    Args:
        channels: C; hidden: width of the squeezed descriptor; gated: see :class:`ConditionedLayer`.
    """

    def __init__(self, channels: int, hidden: int, gated: bool = False) -> None:
        super().__init__()
        self.reduce = ConditionedLayer(nn.Linear(channels, hidden), gated)
        self.expand = nn.Linear(hidden, channels)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` or, each feature a channel, ``[B, C]``."""
        z = x.mean(dim=(2, 3)) if x.ndim == 4 else x
        scale = 2 * torch.sigmoid(self.expand(F.relu(self.reduce(z))))
        return x * (scale[:, :, None, None] if x.ndim == 4 else scale)
