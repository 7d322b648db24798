"""Corrupted images: the 15 corruptions of Hendrycks and Dietterich (2019), cached on disk, as domains of a reader."""

from __future__ import annotations

import hashlib
import os
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from uda.data import Reader
from uda.data.domains import DomainData, FileInputs, TensorInputs
from uda.data.views import seeded
from uda.errors import UDAError, nearest

#: In the order of the usual stream.
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
_IMPULSE = (0.03, 0.06, 0.09, 0.17, 0.27)


def corrupt_images(
    images: np.ndarray, corruption: str, severity: int = 5, seed: int = 0, cache: str | Path | None = None
) -> np.ndarray:
    """Images with a corruption; the same for the same arguments.

    The package corrupt-tta has ImageNet-C's constants for every size, which are harder on 32x32 images than
    CIFAR-10-C's: figures are not those of that benchmark.

    Args:
        images: uint8 ``[N, H, W, 3]``, or ``[N, H, W]`` (gray: corrupted as three equal channels, then averaged).
        corruption: one of ``CORRUPTIONS``; severity: 1 to 5; seed: of the noise.
        cache: folder of npz files, named by corruption, severity and a hash of images and seed; None: none.

    Returns:
        uint8 of the same shape.

    Raises:
        UDAError: unknown corruption, other images, no package corrupt-tta.
    """
    if corruption not in CORRUPTIONS:
        raise UDAError(f"unknown corruption {corruption!r}. {nearest(corruption, CORRUPTIONS)}")
    if severity not in range(1, 6):
        raise UDAError(f"a severity is 1 to 5, not {severity}.")
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] != 3):
        raise UDAError(f"corruptions take uint8 images [N, H, W] or [N, H, W, 3], not {images.dtype} {images.shape}.")
    if len(images) == 0:
        raise UDAError("corruptions: there are no images.")
    if cache is None:
        return _corrupted(images, corruption, severity, seed)
    digest = hashlib.sha256(f"{images.shape} {seed} {_version()}".encode() + np.ascontiguousarray(images).tobytes())
    file = Path(cache).expanduser() / f"{corruption}-{severity}-{digest.hexdigest()[:16]}.npz"
    if file.is_file():
        return np.load(file)["images"]
    out = _corrupted(images, corruption, severity, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f"{file.stem}.{os.getpid()}.part.npz")  # whole or not at all, also from two processes
    np.savez_compressed(beside, images=out)
    os.replace(beside, file)
    return out


def _version() -> str:
    try:
        return metadata.version("corrupt-tta")
    except metadata.PackageNotFoundError as error:
        raise UDAError("corruptions need the package corrupt-tta: pip install 'uda-testtime[corruptions]'") from error


def _corrupted(images: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    _version()
    from corrupt_tta import corrupt

    gray = images.ndim == 3
    out = np.empty_like(images)
    number = CORRUPTIONS.index(corruption)
    for i, image in enumerate(np.repeat(images[..., None], 3, -1) if gray else images):
        with seeded(int(np.random.SeedSequence([seed, number, severity, i]).generate_state(1)[0])):
            # the package's salt and pepper takes numbers that no seed fixes
            found = _impulse(image, severity) if corruption == "impulse_noise" else corrupt(image, severity, corruption)
        found = np.asarray(found, dtype=np.float64).clip(0, 255)
        out[i] = np.round(found.mean(-1) if gray else found).astype(np.uint8)
    return out


def _impulse(image: np.ndarray, severity: int) -> np.ndarray:
    """Salt and pepper, half of each, on single values as scikit-image does it."""
    hit = np.random.random(image.shape) < _IMPULSE[severity - 1]
    return np.where(hit, 255 * (np.random.random(image.shape) < 0.5), image)


class _Ordered(TensorInputs):
    """Images in memory whose pool order is that of the files which they were made of."""

    def __init__(self, x: Tensor, order: np.ndarray | None) -> None:
        super().__init__(x)
        self._order = order

    def order(self) -> np.ndarray | None:
        return self._order


class Corruptions(Reader):
    """The domains of another reader, clean under their own names and corrupted as ``<domain>/<corruption>``.

    ``<domain>/<corruption>/<severity>`` has a severity of its own. Corruption comes before the views: images of an
    array keep their size, image files are resized to ``size`` first.

    Args:
        reader: of the clean domains, in images.
        severity: 1 to 5, where the name has none.
        seed: of the noise.
        cache: folder for the corrupted arrays; None: they are made at each start.
        size: side in pixels for image files.
    """

    def __init__(
        self, reader: Reader, severity: int = 5, seed: int = 0, cache: str | None = None, size: int | None = None
    ) -> None:
        if severity not in range(1, 6):
            raise UDAError(f"Corruptions: a severity is 1 to 5, not {severity}.")
        self.reader, self.severity, self.seed, self.cache, self.size = reader, severity, seed, cache, size

    def domains(self) -> list[str]:
        """Clean names, then corrupted ones."""
        clean = self.reader.domains()
        return [*clean, *(f"{d}/{c}" for d in clean for c in CORRUPTIONS)]

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        base, severity = domain, self.severity
        if domain.rpartition("/")[2].isdecimal():
            base, _, number = domain.rpartition("/")
            severity = int(number)
        base, _, corruption = base.rpartition("/")
        if corruption not in CORRUPTIONS:
            if domain not in self.reader.domains():
                raise UDAError(f"unknown domain {domain!r}. {nearest(domain, self.domains())}")
            return self.reader.read(domain)
        clean = self.reader.read(base)
        images = corrupt_images(self._pixels(clean), corruption, severity, self.seed, self.cache)
        x = torch.from_numpy(images)
        x = x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        return DomainData(domain, _Ordered(x, clean.inputs.order()), clean.labels, clean.class_names, clean.ids)

    def _pixels(self, clean: DomainData) -> np.ndarray:
        inputs = clean.inputs
        if isinstance(inputs, FileInputs):
            if self.size is None:
                raise UDAError("Corruptions: give size, the side that image files are resized to before.")
            return np.stack([np.asarray(inputs.load(i).resize((self.size,) * 2)) for i in range(len(inputs))])
        if inputs.kind != "images":
            raise UDAError("Corruptions: these domains are features, not images.")
        x = inputs.fetch(torch.arange(len(inputs)))
        x = (x * 255).round().clamp(0, 255).to(torch.uint8).numpy()
        return x[:, 0] if x.shape[1] == 1 else x.transpose(0, 2, 3, 1)
