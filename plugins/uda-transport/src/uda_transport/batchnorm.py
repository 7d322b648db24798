"""BatchNorm in fusion: folded for the average, and written back so that training can go on from it.

Let ``z = gamma (u - mu) / sigma + beta`` stand behind ``u = W x + b`` in each network. In evaluation this is
``W_f x + b_f`` with ``W_f = gamma / sigma W``. What is averaged (neurons aligned) is ``W_f`` and ``b_f``; the fused
network has a BatchNorm with the averages ``|gamma|``, ``beta`` and ``sigma``, behind weights ``k W_f`` with
``k = sigma / |gamma|``, whose running mean is ``k (beta - b_f) + b``. In evaluation that is exactly the averaged
``W_f x + b_f``; a network fused with itself keeps its weights (up to the sign of gamma) and statistics; and batch
statistics, or new running ones (:func:`recalibrate`), give neurons the averaged mean ``beta`` and deviation
``|gamma|``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import uda


@dataclass
class BatchNorm:
    """Normalisation of n neurons; all ``[n]``, float64.

    Attributes:
        scale, shift: in evaluation ``z = scale u + shift``.
        gain: ``|gamma|``; offset: ``beta``; mean: running mean; std: ``sqrt(var + eps)``.
    """

    scale: Tensor
    shift: Tensor
    gain: Tensor
    offset: Tensor
    mean: Tensor
    std: Tensor

    @staticmethod
    @torch.no_grad()
    def of(module: nn.Module) -> BatchNorm:
        """From a BatchNorm, or the gain and offset of a LayerNorm."""
        if isinstance(module, _BatchNorm):
            mean, std = module.running_mean.double(), (module.running_var.double() + module.eps).sqrt()
        else:
            mean = torch.zeros(module.normalized_shape, dtype=torch.float64)
            std = torch.ones_like(mean)
        gain = torch.ones_like(mean) if module.weight is None else module.weight.double()
        offset = torch.zeros_like(mean) if module.bias is None else module.bias.double()
        return BatchNorm(gain / std, offset - gain / std * mean, gain.abs(), offset, mean, std)

    def moved(self, rows: Tensor) -> BatchNorm:
        """Means over neurons: ``rows`` ``[n_ref, n]`` sum to 1."""
        return BatchNorm(*(rows @ v for v in astuple(self)))


def averaged(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum_k s_k v_k``."""
    return sum(s * v for s, v in zip(shares, values, strict=True))


def mean_norm(norms: Sequence[BatchNorm], shares: Sequence[float]) -> BatchNorm:
    """Average of aligned norms."""
    return BatchNorm(*(averaged(values, shares) for values in zip(*map(astuple, norms), strict=True)))


@torch.no_grad()
def write_behind(
    module: _BatchNorm, norm: BatchNorm, weight: Tensor, bias: Tensor, raw_bias: Tensor
) -> Tensor:
    """Fill the BatchNorm behind a layer, and return the layer's weights ``k W_f``.

    Args:
        module: to be filled; norm: the average; weight: ``W_f`` ``[n, in, ...]``; bias: ``b_f`` ``[n]``.
        raw_bias: what the layer will have as its own bias ``[n]``.
    """
    var = (norm.std.square() - module.eps).clamp_min(0)
    std = (var + module.eps).sqrt()
    k = torch.where(norm.gain > 0, std / norm.gain, 1.0)
    module.running_var.copy_(var)
    module.running_mean.copy_(k * (norm.offset - bias) + raw_bias)
    if module.weight is not None:
        module.weight.copy_(norm.gain)
        module.bias.copy_(norm.offset)
    return k.reshape(-1, *[1] * (weight.ndim - 1)) * weight


@torch.no_grad()
def write_alone(module: nn.Module, norm: BatchNorm) -> None:
    """Fill a norm with no layer directly before it: its ``scale`` and ``shift`` are the averages."""
    if not isinstance(module, _BatchNorm):
        if module.weight is not None:
            module.weight.copy_(norm.scale)
        if module.bias is not None:
            module.bias.copy_(norm.shift)
        return
    if module.weight is None:  # all that is free is the statistics
        module.running_var.copy_((norm.scale**-2 - module.eps).clamp_min(0))
        module.running_mean.copy_(-norm.shift / norm.scale)
        return
    var = (norm.std.square() - module.eps).clamp_min(0)
    module.running_var.copy_(var)
    module.running_mean.copy_(norm.mean)
    module.weight.copy_(norm.scale * (var + module.eps).sqrt())
    module.bias.copy_(norm.shift + norm.scale * norm.mean)


@torch.no_grad()
def recalibrate(net: nn.Module, samples: Tensor, batch: int = 64) -> None:
    """New running statistics of all BatchNorms, the mean over batches of ``samples`` ``[S, ...]``.

    Raises:
        UDAError: fewer than two samples.
    """
    if len(samples) < 2:
        raise uda.UDAError(f"BatchNorm statistics need two samples or more, not {len(samples)}.")
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # the plain mean over batches
        m.train()
    for part in samples.tensor_split(max(1, len(samples) // batch)):
        net(part)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
        m.eval()
