"""What a run looked like over time: one row a validation, kept whatever logger there is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HISTORY = "history.jsonl"


class ObjectiveMeans:
    """Means of logged objectives between two validations; nothing is copied from a device before :meth:`take`."""

    def __init__(self) -> None:
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Any]) -> None:
        """Take in the values of one logged step: scalars or scalar tensors."""
        for name, value in values.items():
            value = value.detach().double() if isinstance(value, torch.Tensor) else float(value)
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, and start anew."""
        out = {name: float(total) / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return out

    def state(self) -> dict[str, dict[str, float]]:
        """What a checkpoint between two validations must keep."""
        return {"sums": {name: float(total) for name, total in self._sums.items()}, "counts": dict(self._counts)}

    def load(self, state: Mapping[str, Mapping[str, float]]) -> None:
        """Go on from a checkpoint."""
        self._sums, self._counts = dict(state["sums"]), {k: int(n) for k, n in state["counts"].items()}


def write_history(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write ``history.jsonl``, one JSON object a row; what is not finite becomes null."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{HISTORY}"
    partial.write_text("".join(json.dumps({k: plain(v) for k, v in row.items()}) + "\n" for row in rows))
    partial.replace(folder / HISTORY)


def read_history(folder: Path) -> list[dict[str, Any]]:
    """Rows of ``history.jsonl`` with null as NaN; empty where there is no such file."""
    file = folder / HISTORY
    if not file.is_file():
        return []
    rows = (json.loads(line) for line in file.read_text().splitlines() if line.strip())
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
