"""A run from the files of its directory."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from uda.errors import UDAError
from uda.metrics.names import SOURCE_FIGURES
from uda.report.collect.run import Run
from uda.run.directory import read_record
from uda.run.history import read_history


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name for each directory: what of its path is not common to all of them."""
    parts = [list(p.absolute().parts) for p in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:]) if parts[0][-1].startswith("seed") else parts[0][-1]]
    while min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def read_run(folder: str | Path, name: str = "") -> Run:
    """A run from its directory; the model is not touched.

    Raises:
        UDAError: no directory of a finished run.
    """
    path = Path(folder).expanduser()
    for file in ("config.yaml", "summary.json"):
        if not (path / file).is_file():
            raise UDAError(f"{str(folder)!r} is no directory of a finished run: no {file}. {_hint(path)}")
    try:
        summary = json.loads((path / "summary.json").read_text())
        config = yaml.safe_load((path / "config.yaml").read_text())
    except (ValueError, yaml.YAMLError) as error:
        raise UDAError(f"{str(folder)!r}: summary.json or config.yaml is damaged ({error}): run it again.") from error
    if not (isinstance(summary, dict) and isinstance(config, dict)):
        raise UDAError(f"{str(folder)!r}: summary.json and config.yaml must hold mappings: run it again.")
    history = read_history(path)
    run = Run(name or short_names([path])[0], path, config, summary, read_record(path), history, {})
    logged = logged_rows(path / "logs" / "metrics.csv")
    run.objectives = columns(logged or history, "train/")
    if not run.history:
        run.history = validations(logged)
    return run


def _hint(path: Path) -> str:
    if not path.is_dir():
        return "There is no such directory."
    below = sorted(f.parent for f in [*path.glob("*/summary.json"), *path.glob("*/*/summary.json")])
    if below:
        return f"Below it are {', '.join(map(str, below[:4]))}{' and others' if len(below) > 4 else ''}."
    return "`uda fit` writes one; a run that was stopped goes on with --ckpt_path last."


def logged_rows(file: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``; ``step`` counts the steps that are done, as in the history."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        rows = [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(lines)]
    return [{**row, "step": row["step"] + 1} for row in rows if "step" in row]


def validations(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The rows that come from a validation."""
    own = (*SOURCE_FIGURES, "oracle/", "select/")
    return [
        {**r, "step": int(r["step"]), "epoch": int(r.get("epoch", 0))}
        for r in rows
        if any(k.startswith(own) for k in r)
    ]


def columns(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each name with a prefix, which is cut off; what is not finite is left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and math.isfinite(value):
                steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                values.append(value)
    return {k: (np.array(s, float), np.array(v, float)) for k, (s, v) in found.items()}
