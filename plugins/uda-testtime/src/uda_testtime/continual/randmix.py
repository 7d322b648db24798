"""RandMix: images mixed with what small random auto-encoders make of them, without any training."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

KERNELS = (5, 9, 13, 17)
STYLE = 10  # numbers that a sample's style is made of


def _weight(shape: tuple[int, ...], fan_in: int, generator: Generator, like: Tensor) -> Tensor:
    """Uniform in ``+- 1 / sqrt(fan_in)``, as torch starts its layers."""
    return ((2 * torch.rand(shape, generator=generator) - 1) / fan_in**0.5).to(like)


def _restyled(h: Tensor, generator: Generator) -> Tensor:
    """Instance normalisation with a random scale and shift of each sample and channel (AdaIN)."""
    c = h.shape[1]
    style = torch.randn(len(h), STYLE, generator=generator).to(h)
    scale, shift = (style @ _weight((STYLE, 2 * c), STYLE, generator, h)).chunk(2, 1)
    return (1 + scale[:, :, None, None]) * F.instance_norm(h) + shift[:, :, None, None]


def randmix_view(pixels: Tensor, generator: Generator) -> Tensor:
    """``sigmoid((w_0 x + sum_i w_i R_i(x)) / sum_i w_i)`` (RaTP: Liu et al., ICLR 2023, section 3.1).

    ``R_i`` are a convolution and a transposed one with AdaIN in between, of kernels 5, 9, 13 and 17 where they fit into
    the image, and a 1 x 1 convolution with dropout 0.2; all weights and ``w`` (normal) are drawn anew, once a batch.

    Args:
        pixels: ``[B, C, H, W]`` in [0, 1]; they enter as ``2 x - 1``. generator: on the CPU.

    Returns:
        ``[B, C, H, W]`` in (0, 1).
    """
    x, (_, c, h, w) = 2 * pixels - 1, pixels.shape
    noisy = x + 0.001 * torch.randn(x.shape, generator=generator).to(x)
    colour = F.conv2d(noisy, _weight((c, c, 1, 1), c, generator, x), _weight((c,), c, generator, x))
    kept = (torch.rand(x.shape, generator=generator) >= 0.2).to(x)
    branches = [x, torch.tanh(colour * kept / 0.8)]
    for k in (k for k in KERNELS if k < min(h, w)):
        fan = c * k * k
        down, up = (_weight((c, c, k, k), fan, generator, x) for _ in range(2))
        before, after = (_weight((c,), fan, generator, x) for _ in range(2))
        code = _restyled(F.conv2d(noisy, down, before), generator)
        branches.append(torch.tanh(F.conv_transpose2d(code, up, after)))
    mix = torch.randn(len(branches), generator=generator).to(x)
    total = sum(m * b for m, b in zip(mix, branches, strict=True))
    return torch.sigmoid(total / mix.sum())
