"""Views of arrays, computed for a whole batch at once."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from uda.data.samplers import derive_seed
from uda.data.views import ViewName, Views
from uda.errors import UDAError


def _generator(seed: int, view: str) -> Generator:
    return Generator().manual_seed(derive_seed(seed, view))


def _uniform(n: int, limit: float, generator: Generator) -> Tensor:
    return (2 * torch.rand(n, generator=generator) - 1) * limit


def jitter(x: Tensor, shift: float, rotate: float, generator: Generator, fill: float = 0.0) -> Tensor:
    """Move and turn each image by a random amount, bilinear.

    Args:
        x: images [B, C, H, W].
        shift: largest move along each axis, in pixels.
        rotate: largest turn in degrees, either way.
        generator: of the random numbers.
        fill: value of what comes in from outside.

    Returns:
        Images [B, C, H, W].
    """
    n, _, height, width = x.shape
    angle = _uniform(n, math.radians(rotate), generator)
    dx, dy = _uniform(n, shift, generator).round(), _uniform(n, shift, generator).round()
    cos, sin = angle.cos(), angle.sin()
    # Grid coordinates run from -1 to 1 over the image, so the turn is scaled by the aspect ratio.
    rows = [cos, -sin * height / width, 2 * dx / width, sin * width / height, cos, 2 * dy / height]
    theta = torch.stack(rows, dim=1).reshape(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill


def erase(x: Tensor, share: float, generator: Generator, fill: float = 0.0) -> Tensor:
    """Blank a random square of ``share`` of the side in each image [B, C, H, W]."""
    n, _, height, width = x.shape
    side_y, side_x = max(1, round(share * height)), max(1, round(share * width))
    top = torch.rand(n, generator=generator) * (height - side_y + 1)
    left = torch.rand(n, generator=generator) * (width - side_x + 1)
    rows, columns = torch.arange(height), torch.arange(width)
    in_y = (rows >= top.floor()[:, None]) & (rows < top.floor()[:, None] + side_y)
    in_x = (columns >= left.floor()[:, None]) & (columns < left.floor()[:, None] + side_x)
    return x.masked_fill((in_y[:, None, :, None] & in_x[:, None, None, :]), fill)


class TensorViews(Views):
    """Views of small images held as arrays, in [0, 1].

    All views: resize to ``size`` and repeat one channel to ``channels`` where these are given, normalise.
        Weak moves
    (and mirrors, if ``flip``); strong also turns, adds noise and blanks a square. Output [B, C, size, size].

    Args:
        size: side in pixels; None: as stored.
        channels: 1 or 3; None: as stored.
        train: what the train view does.
        shift: largest move, as a share of the side.
        rotate: largest turn of the strong view in degrees.
        noise: standard deviation of the strong view's noise.
        erase: side of the strong view's blank square as a share of the image's; 0: none.
        flip: mirror half of the images (not for digits).
        mean, std: of the channels, or one number for all; None: no normalisation.
    """

    def __init__(
        self,
        size: int | None = None,
        channels: int | None = None,
        train: Literal["none", "weak", "strong"] = "none",
        shift: float = 0.1,
        rotate: float = 15.0,
        noise: float = 0.1,
        erase: float = 0.25,
        flip: bool = False,
        mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:
        if train not in ("none", "weak", "strong"):
            raise UDAError(f"TensorViews: train {train!r} must be none, weak or strong")
        if channels not in (None, 1, 3):
            raise UDAError(f"TensorViews: channels must be 1 or 3, not {channels}")
        if (mean is None) != (std is None):
            raise UDAError("TensorViews: give both mean and std, or neither")
        self.size, self.channels, self.train = size, channels, train
        self.shift, self.rotate, self.noise, self.erase, self.flip = shift, rotate, noise, erase, flip
        self.mean, self.std = mean, std

    def apply(self, raw: Tensor | list[Any], view: ViewName, seed: int) -> Tensor:
        """Batch of a view, see :meth:`Views.apply`."""
        if not isinstance(raw, Tensor) or raw.dim() != 4:
            got = f"a tensor of shape {tuple(raw.shape)}" if isinstance(raw, Tensor) else "image files"
            raise UDAError(
                f"TensorViews takes image batches [B, C, H, W], not {got}; "
                "use ImageViews for files, FeatureViews for features"
            )
        x = self._shaped(raw.float())
        strength = {"train": self.train, "test": "none"}.get(view, view)
        if strength != "none":
            x = self._augmented(x, strength == "strong", _generator(seed, view))
        if self.mean is None:
            return x
        mean, std = torch.as_tensor(self.mean).float(), torch.as_tensor(self.std).float()
        return (x - mean.reshape(1, -1, 1, 1)) / std.reshape(1, -1, 1, 1)

    def _shaped(self, x: Tensor) -> Tensor:
        if self.channels == 3 and x.shape[1] == 1:
            x = x.expand(-1, 3, -1, -1)
        elif self.channels == 1 and x.shape[1] == 3:
            x = (x * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        if self.size is not None and tuple(x.shape[2:]) != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        return x

    def _augmented(self, x: Tensor, strong: bool, generator: Generator) -> Tensor:
        n = len(x)
        if self.flip:
            mirror = torch.rand(n, generator=generator) < 0.5
            x = torch.where(mirror[:, None, None, None], x.flip(-1), x)
        x = jitter(x, self.shift * x.shape[-1], self.rotate if strong else 0.0, generator)
        if strong and self.noise:
            x = (x + self.noise * torch.randn(x.shape, generator=generator)).clamp_(0, 1)
        if strong and self.erase:
            x = erase(x, self.erase, generator)
        return x


class FeatureViews(Views):
    """Views of feature rows: train and test as they are, weak with noise, strong with more noise and dropout.

    Args:
        weak_noise, strong_noise: standard deviation of the noise as a share of each row's own.
        dropout: share of the features that the strong view sets to 0 (the others are scaled up to keep the
            mean).
    """

    def __init__(self, weak_noise: float = 0.05, strong_noise: float = 0.2, dropout: float = 0.2) -> None:
        if not 0 <= dropout < 1:
            raise UDAError(f"FeatureViews: dropout must be in [0, 1), not {dropout}")
        self.weak_noise, self.strong_noise, self.dropout = weak_noise, strong_noise, dropout

    def apply(self, raw: Tensor | list[Any], view: ViewName, seed: int) -> Tensor:
        """Batch of a view, see :meth:`Views.apply`."""
        if not isinstance(raw, Tensor):
            raise UDAError("FeatureViews takes feature rows, not images; use ImageViews for image files")
        x = raw.float()
        if view in ("train", "test"):
            return x
        generator = _generator(seed, view)
        scale = x.flatten(1).std(dim=1, correction=0).reshape(-1, *[1] * (x.dim() - 1))
        noise = self.weak_noise if view == "weak" else self.strong_noise
        x = x + noise * scale * torch.randn(x.shape, generator=generator)
        if view == "strong" and self.dropout:
            keep = torch.rand(x.shape, generator=generator) >= self.dropout
            x = x * keep / (1 - self.dropout)
        return x
