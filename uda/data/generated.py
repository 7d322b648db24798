"""Domains that need no files: digits, and scikit-learn's toy problems under a shift."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch

from uda.data.domains import DomainData, TensorInputs
from uda.data.readers import Reader
from uda.errors import UDAError


class Digits(Reader):
    """8x8 digits: ``rendered`` from fonts and ``handwritten`` (scikit-learn's 1,797 digits). Ten classes, no
    download.

    Args:
        n_rendered: number of rendered digits.
        seed: of the rendering.
    """

    def __init__(self, n_rendered: int = 3000, seed: int = 0) -> None:
        self.n_rendered, self.seed = n_rendered, seed

    def domains(self) -> list[str]:
        """Names of the domains."""
        return ["rendered", "handwritten"]

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, "Digits")
        from uda.data.rendered import handwritten_digits, render_digits

        x, y = render_digits(self.n_rendered, self.seed) if domain == "rendered" else handwritten_digits()
        inputs = TensorInputs(torch.as_tensor(np.asarray(x), dtype=torch.float32), "images")
        labels = torch.as_tensor(np.asarray(y), dtype=torch.int64)
        return DomainData(domain, inputs, labels, [str(d) for d in range(10)])


class Generated(Reader):
    """Toy features from scikit-learn, shifted a step more in each target: ``source``, ``target``,
    ``target2``, ...

    Target k (k = 1, 2, ...) is a new draw of the same problem, rotated by ``k * rotation`` about the origin
    in the first two features and moved by ``k * translation`` along every feature.

    Args:
        kind: ``moons`` (2 classes), ``blobs`` (``classes`` Gaussian balls) or ``classification``.
        n: rows a domain.
        classes: number of classes (``moons`` has always 2).
        features: number of features (``moons`` has always 2).
        rotation: in degrees.
        translation: in units of the features.
        noise: standard deviation within a class (``moons`` and ``blobs``).
        targets: number of target domains.
        seed: of the draw.
    """

    def __init__(
        self,
        kind: Literal["moons", "blobs", "classification"] = "moons",
        n: int = 600,
        classes: int = 2,
        features: int = 2,
        rotation: float = 30.0,
        translation: float = 0.0,
        noise: float = 0.1,
        targets: int = 1,
        seed: int = 0,
    ) -> None:
        if kind not in ("moons", "blobs", "classification"):
            raise UDAError(f"Generated kind {kind!r} is unknown; use moons, blobs or classification")
        if kind == "moons" and (classes, features) != (2, 2):
            raise UDAError(
                "moons have exactly 2 classes and 2 features; use blobs or classification for others"
            )
        if features < 2 or classes < 2 or n < classes or targets < 1:
            raise UDAError("Generated needs features >= 2, classes >= 2, n >= classes and targets >= 1")
        self.kind, self.n, self.classes, self.features = kind, n, classes, features
        self.rotation, self.translation, self.noise = rotation, translation, noise
        self.targets, self.seed = targets, seed

    def domains(self) -> list[str]:
        """Names of the domains."""
        return ["source"] + ["target" if k == 1 else f"target{k}" for k in range(1, self.targets + 1)]

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, f"Generated({self.kind!r})")
        k = self.domains().index(domain)
        x, y = self._draw(k)
        angle = math.radians(k * self.rotation)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        x[:, :2] = x[:, :2] @ turn.T
        x += k * self.translation
        inputs = TensorInputs(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), "features")
        return DomainData(
            domain, inputs, torch.from_numpy(y.astype(np.int64)), [str(c) for c in range(self.classes)]
        )

    def _draw(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        from sklearn import datasets

        if self.kind == "moons":
            x, y = datasets.make_moons(self.n, noise=self.noise, random_state=self.seed + k)
            return x - x.mean(axis=0), y
        rng = np.random.default_rng([self.seed, k])
        if self.kind == "blobs":
            # Centres must be the same in every domain: only then is the shift the whole difference.
            centres = np.random.default_rng(self.seed).uniform(-3, 3, (self.classes, self.features))
            y = rng.permutation(np.arange(self.n) % self.classes)
            return centres[y] + self.noise * rng.standard_normal((self.n, self.features)), y
        # One problem, cut into equal shares: its geometry depends on the seed and on the number of rows.
        informative = max(2, min(self.features, math.ceil(math.log2(2 * self.classes)) + 1))
        x, y = datasets.make_classification(
            self.n * (self.targets + 1),
            n_features=self.features,
            n_informative=informative,
            n_redundant=0,
            n_classes=self.classes,
            n_clusters_per_class=1,
            class_sep=1.5,
            random_state=self.seed,
        )
        part = slice(k * self.n, (k + 1) * self.n)
        return x[part].copy(), y[part]
