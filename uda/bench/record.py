"""What the ledger keeps of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from uda.bench.launch import Outcome
from uda.bench.merge import folded
from uda.bench.suite import Run
from uda.metrics.names import MEASURES

_METRICS = ("source_accuracy", "target_accuracy", "target_class_accuracy")
_SETTING = ("setting", "headline")  # of runs that are not closed
_COPIED = ("seconds", "steps", "epochs", "peak_memory_mib", "device", "world_size", "versions", "config_hash")


def ledger_line(run: Run, outcome: Outcome) -> dict[str, Any]:
    """The record of a run that has ended.

    Finished: suite, task, method, seed, key, ``metrics`` (fractions of 1; those of the target ``last``, ``selected``
    and ``oracle``), setting and headline measure where classes differ, ``scores`` (label-free, by name),
    ``selection``, seconds, peak memory in MiB, versions, the full config and its hash. Failed: the last lines of the
    log.
    """
    line: dict[str, Any] = {
        "suite": run.suite, "task": run.task, "method": run.method, "seed": run.seed, "key": run.key,
        "status": "failed", "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "wall_seconds": round(outcome.seconds, 2), "select_by": run.select_by,
    }  # fmt: skip
    summary = read_summary(run.folder)
    if outcome.code != 0 or summary is None:
        why = outcome.error or "the run ended without a summary"
        return {**line, "exit_code": outcome.code, "error": why, "config": run.config}
    used = outcome.used or {}
    return {
        **line,
        "status": "finished",
        **{name: summary[name] for name in _SETTING if summary.get("setting") not in (None, "closed")},
        "metrics": {name: summary.get(name) for name in _METRICS} | {m: summary[m] for m in MEASURES if m in summary},
        "scores": summary.get("scores") or {},
        "selection": summary.get("selection"),
        **{name: summary.get(name) for name in _COPIED},
        "config": without_nulls(folded(full_config(run), used)),
    }


def read_summary(folder: Path) -> dict[str, Any] | None:
    """``summary.json`` of a run, or None."""
    try:
        return json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def full_config(run: Run) -> dict[str, Any]:
    """The config with all defaults filled in, as the run has written it; else as asked for."""
    try:
        return yaml.safe_load((run.folder / "config.yaml").read_text()) or run.config
    except (OSError, yaml.YAMLError):
        return run.config


def without_nulls(value: Any) -> Any:
    """Less what is null: those settings have no effect, and the ledger stays small."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value
