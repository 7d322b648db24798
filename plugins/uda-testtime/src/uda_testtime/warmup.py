"""Before the stream: training of added parts on labelled source samples, also as if they came from other domains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn
from torchvision.transforms import functional as T

from uda.errors import UDAError
from uda_testtime.views import uniform

if TYPE_CHECKING:
    from uda_testtime.adapter import Adapter
    from uda_testtime.source import SourceSamples

#: pseudo-domains of images and of feature rows; the first is the source itself
PIXELS = ("clean", "dark", "fog", "noise", "blur")
ROWS = ("clean", "noise", "masked", "gain", "offset")
DOMAINS = len(PIXELS)


def pixel_domain(x: Tensor, generator: Generator, kind: int) -> Tensor:
    """Images of a pseudo-domain, one draw of its strength for the batch.

    Args:
        x: pixels ``[B, C, H, W]`` in [0, 1]; generator: on the CPU; kind: place in ``PIXELS``. ``dark`` is a factor of
            0.3 to 0.6, ``fog`` a share of 0.3 to 0.6 of light gray, ``noise`` Gaussian with a standard deviation of
            0.05 to 0.15, ``blur`` Gaussian over up to a sixteenth of the side.
    """
    name = PIXELS[kind]
    if name == "dark":
        x = x * uniform(0.3, 0.6, generator)
    elif name == "fog":
        x = torch.lerp(x, torch.full_like(x, 0.8), uniform(0.3, 0.6, generator))
    elif name == "noise":
        x = x + uniform(0.05, 0.15, generator) * torch.randn(x.shape, generator=generator).to(x)
    elif name == "blur":
        size = max(3, min(x.shape[-2:]) // 16 * 2 + 1)
        sigma = uniform(0.15, 0.4, generator) * size
        x = T.gaussian_blur(x, [size, size], [sigma, sigma])
    return x.clamp(0, 1)


def row_domain(x: Tensor, generator: Generator, kind: int) -> Tensor:
    """Feature rows ``[B, D]`` of a pseudo-domain, place ``kind`` in ``ROWS``.

    ``noise`` of half a row's standard deviation, ``masked`` without three tenths of its entries; ``gain`` and
    ``offset`` are one draw for the batch: factors ``exp(0.3 n)``, shifts of half a standard deviation.
    """
    name, size = ROWS[kind], x.std(1, correction=0, keepdim=True)
    if name == "noise":
        return x + 0.5 * size * torch.randn(x.shape, generator=generator).to(x)
    if name == "masked":
        return x * (torch.rand(x.shape, generator=generator) >= 0.3).to(x)
    if name == "gain":
        return x * (0.3 * torch.randn(x.shape[1], generator=generator)).exp().to(x)
    if name == "offset":
        return x + 0.5 * size * torch.randn(x.shape[1], generator=generator).to(x)
    return x


def pseudo_domain(a: Adapter, x: Tensor, kind: int) -> Tensor:
    """Source inputs ``[B, ...]`` as if they came from pseudo-domain ``kind``; 0 leaves them."""
    if kind == 0:
        return x
    return row_domain(x, a.generator, kind) if x.dim() == 2 else a.view(x, partial(pixel_domain, kind=kind))


def warm_up(
    a: Adapter, source: SourceSamples, parts: list[nn.Parameter], loss: Callable[[Tensor, Tensor], Tensor], epochs: int,
    lr: float, batch_size: int, **options: Any,
) -> None:  # fmt: skip
    """Train ``parts`` alone by Adam on ``loss(x, y)`` of shuffled source batches; afterwards nothing needs gradients.

    Raises:
        UDAError: the loss is no finite number.
    """
    if not epochs or not lr or not parts:
        return
    everything = [*a.net.parameters(), *a.extra.parameters()]
    needed = [p.requires_grad for p in everything]
    for p in everything:
        p.requires_grad_(False)
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parts], lr=lr, **options)
    for _ in range(epochs):
        for batch in source.batches(batch_size, a.generator):
            optimizer.zero_grad(set_to_none=True)
            value = loss(batch["x"].to(parts[0].device), batch["y"].to(parts[0].device))
            value.backward()
            optimizer.step()
        if not bool(torch.isfinite(value)):
            raise UDAError(f"{type(a.method).__name__}: the warm-up on source samples diverged; lower source_lr.")
    for p, before in zip(everything, needed, strict=True):
        p.grad = None
        p.requires_grad_(before)
