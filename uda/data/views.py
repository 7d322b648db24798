"""Views: how a raw input becomes the tensor that the model sees, for training, weak, strong and test."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from uda.data.samplers import derive_seed
from uda.described import Described
from uda.errors import UDAError

ViewName = Literal["train", "weak", "strong", "test"]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Fix the CPU random numbers of torch, numpy and Python inside; outside they go on unchanged."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that would also reseed the accelerator
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


class Views(Described):
    """Views from a transform for each, called on one image at a time.

    A transform takes a PIL RGB image (image files) or a tensor [C, H, W] in [0, 1] (arrays) and gives a
    tensor. ``weak`` and ``strong`` fall back on ``train``, ``test`` and ``train`` on plain conversion to a
    tensor. Random numbers of torch, numpy and Python are seeded for each batch, so that a run can be repeated
    and resumed exactly.
    """

    def __init__(
        self,
        train: Callable | None = None,
        weak: Callable | None = None,
        strong: Callable | None = None,
        test: Callable | None = None,
    ) -> None:
        self.transforms = {"train": train, "weak": weak or train, "strong": strong or train, "test": test}

    def transform(self, view: ViewName) -> Callable:
        """The per-image transform of a view."""
        return self.transforms[view] or _to_tensor

    def apply(self, raw: Tensor | list[Any], view: ViewName, seed: int) -> Tensor:
        """Batch of a view.

        Args:
            raw: B images, or a tensor [B, ...].
            view: which view.
            seed: all of the randomness.

        Returns:
            Tensor [B, ...].

        Raises:
            UDAError: when the views of a batch differ in shape.
        """
        transform = self.transform(view)
        with seeded(derive_seed(seed, view)):
            outputs = [transform(image) for image in raw]
        if not all(isinstance(o, Tensor) for o in outputs):
            raise UDAError(f"the {view} transform must give a tensor, it gave {type(outputs[0]).__name__}")
        if len({o.shape for o in outputs}) > 1:
            shapes = sorted({tuple(o.shape) for o in outputs})
            raise UDAError(
                f"the {view} transform gave different shapes in one batch: {shapes[:3]}; add a resize or crop"
            )
        return torch.stack(outputs)


def _to_tensor(image: Any) -> Tensor:
    if isinstance(image, Tensor):
        return image.float()
    array = np.asarray(image, dtype=np.float32) / 255.0
    return torch.from_numpy(np.ascontiguousarray(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1)))


class ImageViews(Views):
    """The field's views of photographs (torchvision): resize to a square, crop, flip, normalise.

    Train is resize, crop and flip; test is resize and centre crop; weak is resize, shifted crop and flip;
    strong is weak with RandAugment (Cubuk et al. 2020, as FixMatch uses it). Output [B, 3, size, size].

    Args:
        size: side of the crop in pixels.
        resize: side before the crop; None: ``size`` (the test view is then the whole image).
        crop: of the train view. ``random`` is RandomResizedCrop, ``shift`` a crop at a random place,
            ``center`` none.
        scale: share of the area that RandomResizedCrop keeps, from and to.
        flip: mirror half of the training images.
        strong: ``randaugment``, ``trivial`` (TrivialAugmentWide) or ``none`` (the same as weak).
        mean, std: of the channels; None: no normalisation.
    """

    def __init__(
        self,
        size: int = 224,
        resize: int | None = 256,
        crop: Literal["random", "shift", "center"] = "random",
        scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = True,
        strong: Literal["randaugment", "trivial", "none"] = "randaugment",
        mean: tuple[float, float, float] | None = IMAGENET_MEAN,
        std: tuple[float, float, float] | None = IMAGENET_STD,
    ) -> None:
        self.size, self.resize = size, resize or size
        if self.resize < size:
            raise UDAError(
                f"ImageViews: resize ({resize}) must be at least size ({size}), the crop is cut from it"
            )
        if crop not in ("random", "shift", "center") or strong not in ("randaugment", "trivial", "none"):
            raise UDAError(
                f"ImageViews: crop {crop!r} must be random, shift or center; "
                f"strong {strong!r} must be randaugment, trivial or none"
            )
        if (mean is None) != (std is None):
            raise UDAError("ImageViews: give both mean and std, or neither")
        self.crop, self.scale, self.flip, self.strong = crop, tuple(scale), flip, strong
        self.mean, self.std = mean, std
        self._built: dict[str, Callable] = {}

    def transform(self, view: ViewName) -> Callable:
        """The per-image transform of a view, built when first used."""
        if view not in self._built:
            self._built[view] = self._build(view)
        return self._built[view]

    def _build(self, view: ViewName) -> Callable:
        from torchvision.transforms import v2

        crop = {"test": "center", "train": self.crop}.get(view, "shift")
        steps: list[Callable] = [v2.RGB(), v2.Resize((self.resize, self.resize), antialias=True)]
        if crop == "random":
            steps.append(v2.RandomResizedCrop(self.size, scale=self.scale, antialias=True))
        else:
            steps.append(v2.CenterCrop(self.size) if crop == "center" else v2.RandomCrop(self.size))
        if self.flip and view != "test":
            steps.append(v2.RandomHorizontalFlip())
        if view == "strong" and self.strong != "none":
            steps.append(v2.RandAugment(2, 10) if self.strong == "randaugment" else v2.TrivialAugmentWide())
        steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        if self.mean is not None:
            steps.append(v2.Normalize(list(self.mean), list(self.std)))
        return v2.Compose(steps)
