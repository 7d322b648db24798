"""Augmented views of test batches, drawn from a given generator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torchvision.transforms import functional as T

from uda.errors import UDAError

Make = Callable[[Tensor, Generator], Tensor]


def uniform(low: float, high: float, generator: Generator) -> float:
    """One number."""
    return float(torch.rand((), generator=generator)) * (high - low) + low


def cotta_view(
    x: Tensor, generator: Generator, blur: bool = True, noise: float = 0.005, padding: str = "edge", flip: bool = True
) -> Tensor:
    """The pipeline of CoTTA (Wang et al., CVPR 2022; RMT, SANTA and RoTTA use it too), one draw for the whole batch.

    Colour (brightness, contrast, saturation, hue, gamma, in random order), affine, blur, mirror, noise. ROID is
    ``blur=False, noise=0, padding="reflect"``. One channel has no saturation and hue.

    Args:
        x: pixels ``[B, 1 or 3, H, W]`` in [0, 1]; generator: on the CPU.
        noise: standard deviation; padding: around the image before it is moved; flip: mirror one batch in two.

    Returns:
        ``[B, C, H, W]`` in [0, 1].
    """
    g, x = generator, x.clamp(0, 1)
    factors = [uniform(a, b, g) for a, b in ((0.6, 1.4), (0.7, 1.3), (0.5, 1.5), (-0.06, 0.06), (0.7, 1.3))]
    change = [T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue, T.adjust_gamma]
    for i in torch.randperm(5, generator=g).tolist():
        if x.shape[1] == 3 or i in (0, 1, 4):
            x = change[i](x, factors[i])
    h, w = x.shape[-2:]
    x = T.pad(x, [w // 2, h // 2], padding_mode=padding)
    angle, scale = uniform(-15, 15, g), uniform(0.9, 1.1, g)
    move = [round(uniform(-1, 1, g) * side / 16) for side in (w, h)]
    x = T.affine(x, angle, move, scale, [0.0, 0.0], interpolation=T.InterpolationMode.BILINEAR)
    sigma = uniform(0.001, 0.5, g)
    if blur:
        x = T.gaussian_blur(x, [5, 5], [sigma, sigma])
    x = T.center_crop(x, [h, w])
    if uniform(0, 1, g) < 0.5 and flip:
        x = T.hflip(x)
    if noise:
        x = x + noise * torch.randn(x.shape, generator=g).to(x)
    return x.clamp(0, 1)


def feature_view(x: Tensor, generator: Generator, noise: float = 0.1) -> Tensor:
    """Feature rows ``[B, D]`` with noise of ``noise`` times each row's own standard deviation."""
    return x + noise * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=generator).to(x)


class PixelScale:
    """Between what the model takes and pixels in [0, 1].

    Args:
        mean, std: of the channels, with which inputs were normalised; None: they were not.
    """

    def __init__(self, mean: float | list[float] | None = None, std: float | list[float] | None = None) -> None:
        if (mean is None) != (std is None):
            raise UDAError("Give both mean and std of the normalisation, or neither.")
        self.mean, self.std = (None if v is None else torch.as_tensor(v).float() for v in (mean, std))

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(v.to(x).reshape(1, -1, *[1] * (x.dim() - 2)) for v in (self.mean, self.std))

    def pixels(self, x: Tensor) -> Tensor:
        """Un-normalised inputs."""
        if self.mean is None:
            return x
        mean, std = self._shaped(x)
        return x * std + mean

    def inputs(self, pixels: Tensor) -> Tensor:
        """The way back."""
        if self.mean is None:
            return pixels
        mean, std = self._shaped(pixels)
        return (pixels - mean) / std


def view(x: Tensor, scale: PixelScale, generator: Generator, make: Make | None = None) -> Tensor:
    """A view ``[B, ...]`` of inputs ``[B, ...]``, without gradient: ``make`` on pixels, noise on feature rows."""
    with torch.no_grad():
        if x.dim() == 2 and make is None:
            return feature_view(x, generator)
        if x.dim() != 4:
            raise UDAError(f"Augmented views need images [B, C, H, W] or feature rows [B, D], not {tuple(x.shape)}.")
        return scale.inputs((make or cotta_view)(scale.pixels(x), generator).to(x.dtype))
