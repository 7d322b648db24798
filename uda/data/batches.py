"""Batches by request: what a pool position becomes, with unreadable images replaced where asked for."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import LongTensor
from torch.utils.data import Dataset

from uda.data.domains import BadImage, Inputs
from uda.data.views import Views

Batch = dict[str, Any]


class Request(NamedTuple):
    """One batch: positions in the pool and the seed of its augmentation."""

    positions: np.ndarray
    seed: int


class BatchDataset(Dataset):
    """Gives the batch for a request.

    Args:
        inputs: of the domain; they hold no labels.
        rows: row of ``inputs`` at each pool position, int64 [N].
        views: the transforms.
        wanted: view behind each key of the batch, ``{"x": "train", "weak": "weak"}``.
        labels: int64 [N] by pool position; None: batches carry no ``y`` and the object holds none.
        on_bad_image: ``skip`` takes the next readable image instead.
        replace_index: a replacement counts as itself (training); else the batch keeps the index asked for and
            its ``y`` becomes -1 (evaluation).
    """

    def __init__(
        self,
        inputs: Inputs,
        rows: np.ndarray,
        views: Views,
        wanted: dict[str, str],
        labels: LongTensor | None = None,
        on_bad_image: Literal["stop", "skip"] = "stop",
        replace_index: bool = True,
    ) -> None:
        self.inputs, self.views, self.wanted, self.labels = inputs, views, wanted, labels
        self.rows = torch.as_tensor(rows, dtype=torch.int64)
        self.on_bad_image, self.replace_index = on_bad_image, replace_index

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, request: Request) -> Batch:
        index = torch.as_tensor(request.positions, dtype=torch.int64)
        bad: list[tuple[int, str]] = []
        if self.on_bad_image == "skip":
            raw, shown, bad = self._fetch_good(index)
        else:
            raw, shown = self.inputs.fetch(self.rows[index]), index
        batch: Batch = {key: self.views.apply(raw, view, request.seed) for key, view in self.wanted.items()}
        batch["index"] = shown if self.replace_index else index
        if self.labels is not None:
            batch["y"] = self.labels[batch["index"]]
            if bad and not self.replace_index:
                batch["y"][[i for i, _ in bad]] = -1
        if bad:
            batch["bad"] = [path for _, path in bad]
        return batch

    def _fetch_good(self, index: LongTensor) -> tuple[Any, LongTensor, list[tuple[int, str]]]:
        try:
            return self.inputs.fetch(self.rows[index]), index, []
        except BadImage:
            pass
        raw, shown, bad = [], index.clone(), []
        for i, position in enumerate(index.tolist()):
            for attempt in range(len(self.rows)):
                position_now = (position + attempt) % len(self.rows)
                try:
                    raw += self.inputs.fetch(self.rows[position_now : position_now + 1])
                    shown[i] = position_now
                    break
                except BadImage as e:
                    if attempt == 0:
                        bad.append((i, e.path))
            else:
                raise BadImage(
                    f"none of the {len(self.rows)} images can be read; the first is {bad[0][1]!r}", bad[0][1]
                )
        return raw, shown, bad


class BadImageLog:
    """Unreadable images that were skipped, by domain, until they are reported."""

    def __init__(self) -> None:
        self.paths: dict[str, set[str]] = {}
        self.total: dict[str, int] = {}

    def add(self, domain: str, paths: list[str]) -> None:
        """Note files that were skipped."""
        self.paths.setdefault(domain, set()).update(paths)
        self.total[domain] = self.total.get(domain, 0) + len(paths)

    def report(self, domain: str) -> None:
        """Warn once about what was skipped since the last report."""
        paths, total = self.paths.pop(domain, set()), self.total.pop(domain, 0)
        if paths:
            shown = ", ".join(sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
            warnings.warn(
                f"domain {domain!r}: {len(paths)} unreadable image(s) were replaced {total} time(s): {shown}",
                stacklevel=2,
            )
