"""What a reader hands over: a domain's inputs and, where there are any, its labels."""

from __future__ import annotations

import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import LongTensor, Tensor

from uda.errors import UDAError

Kind = Literal["files", "images", "features"]


class BadImage(UDAError):
    """A file that cannot be read as an image; ``path`` names it."""

    # One text is argument enough: a loader's worker process hands the error on as type and message.
    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class Inputs(ABC):
    """The inputs of a domain by row number. It never holds labels.

    ``kind`` says what :meth:`fetch` gives: a list of PIL images for ``files``, a tensor batch otherwise.
    """

    kind: Kind = "images"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fetch(self, rows: Tensor) -> Tensor | list[Any]:
        """Inputs at ``rows`` (int64 [B]): float32 tensor [B, ...] or a list of B images."""

    def order(self) -> np.ndarray | None:
        """Row order that depends on contents, never on where a label put a row; None: as stored."""
        return None

    def take(self, rows: np.ndarray) -> Inputs:
        """The inputs at ``rows`` (int64 [M], each once) alone, numbered anew."""
        return _Taken(self, rows)


class _Taken(Inputs):
    """Some rows of other inputs."""

    def __init__(self, inputs: Inputs, rows: np.ndarray) -> None:
        self.inputs, self.rows, self.kind = inputs, rows, inputs.kind

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, rows: Tensor) -> Tensor | list[Any]:
        """Inputs at ``rows`` (int64 [B])."""
        return self.inputs.fetch(torch.from_numpy(self.rows)[rows])

    def order(self) -> np.ndarray | None:
        """That of the whole, without the rows that are left out."""
        whole = self.inputs.order()
        if whole is None:
            return None
        rank = np.empty(len(whole), dtype=np.int64)
        rank[whole] = np.arange(len(whole))
        return np.argsort(rank[self.rows])


class TensorInputs(Inputs):
    """Rows of one tensor; uint8 images are kept as they are and scaled to [0, 1] when fetched.

    Args:
        x: images [N, C, H, W] (uint8, or float in [0, 1]) or features [N, ...].
        kind: ``images`` or ``features``.
    """

    def __init__(self, x: Tensor, kind: Kind = "images") -> None:
        self.x, self.kind = x, kind
        self.scale = 255.0 if kind == "images" and x.dtype == torch.uint8 else None

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, rows: Tensor) -> Tensor:
        """Float32 batch [B, ...]."""
        batch = self.x[rows].float()
        return batch.div_(self.scale) if self.scale else batch


class FileInputs(Inputs):
    """Images by path, decoded as RGB when fetched.

    Args:
        paths: of the image files.
        by_content: the order of the paths may depend on labels (class folders), so a pool without labels must
            be ordered by content.
    """

    kind: Kind = "files"

    def __init__(self, paths: Sequence[str], by_content: bool = False) -> None:
        # One block of memory: forked workers share it, a list of str would be copied page by page.
        self.paths = np.asarray(paths, dtype=np.str_)
        self.by_content = by_content

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, row: int) -> Any:
        """PIL RGB image of one row.

        Raises:
            BadImage: when the file is missing, empty, cut short or no image.
        """
        from PIL import Image

        path = str(self.paths[row])
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        # PIL raises OSError, SyntaxError, ValueError, struct.error and more on broken files.
        except Exception as e:
            raise BadImage(
                f"cannot read image {path!r}: {type(e).__name__}: {e}. "
                "Repair or remove the file, or set on_bad_image: skip",
                path,
            ) from e

    def fetch(self, rows: Tensor) -> list[Any]:
        """B images."""
        return [self.load(int(r)) for r in rows]

    def take(self, rows: np.ndarray) -> FileInputs:
        """The files at ``rows``."""
        return FileInputs(self.paths[rows], self.by_content)

    def order(self) -> np.ndarray | None:
        """By file size, then by content on equal sizes: moving files among class folders changes nothing."""
        if not self.by_content:
            return None
        try:
            sizes = np.array([os.stat(p).st_size for p in self.paths], dtype=np.int64)
        except OSError as e:
            raise UDAError(f"image file is listed but cannot be found: {e}") from e
        return _by_content(np.argsort(sizes, kind="stable"), sizes, self.paths)


def _by_content(order: np.ndarray, sizes: np.ndarray, paths: np.ndarray) -> np.ndarray:
    """Break ties of size by a hash of 4 KiB from the middle, and what is left by a hash of the whole file."""
    out = order.copy()
    for start, stop in _runs(sizes[order]):
        group = out[start:stop]
        keys = [_digest(paths[i], int(sizes[i]), 4096) for i in group]
        if len(set(keys)) < len(keys):
            keys = [k + _digest(paths[i], int(sizes[i]), None) for k, i in zip(keys, group, strict=True)]
        out[start:stop] = group[sorted(range(len(keys)), key=keys.__getitem__)]
    return out


def _runs(values: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(values)) + 1
    bounds = np.concatenate([[0], edges, [len(values)]])
    return [(int(a), int(b)) for a, b in itertools.pairwise(bounds) if b - a > 1]


def _digest(path: str, size: int, length: int | None) -> bytes:
    if length is None:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()
    descriptor = os.open(path, os.O_RDONLY)  # unbuffered: this is done for thousands of files
    try:
        os.lseek(descriptor, max(0, size // 2 - length // 2), os.SEEK_SET)
        return hashlib.blake2b(os.read(descriptor, length), digest_size=16).digest()
    finally:
        os.close(descriptor)


@dataclass
class DomainData:
    """One domain as read.

    Args:
        name: of the domain.
        inputs: rows without labels.
        labels: int64 [N], ids into ``class_names``, or None for an unlabelled domain; multi-label: 0 or 1, float32
            [N, C], a column a name.
        class_names: of this domain, in its own order.
        ids: a name for each row, for predictions: path or ``domain/row``. Empty: made from the row number.
        multi_label: whether a row may have several classes.
    """

    name: str
    inputs: Inputs
    labels: LongTensor | None
    class_names: list[str]
    ids: Sequence[str] = field(default_factory=list)
    multi_label: bool = False

    def __post_init__(self) -> None:
        if len(self.inputs) == 0:
            raise UDAError(f"domain {self.name!r} is empty: there is nothing to read in it")
        if self.labels is not None and len(self.labels) != len(self.inputs):
            raise UDAError(
                f"domain {self.name!r} has {len(self.inputs)} inputs but {len(self.labels)} labels; "
                "x and y must have equally many rows"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def row_id(self, row: int) -> str:
        """Name of a row."""
        return str(self.ids[row]) if len(self.ids) else f"{self.name}/{row}"
