"""What a suite would run, and how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from uda.bench import chain
from uda.bench.ledger import Ledger
from uda.bench.suite import Run, check_distinct


def estimate(runs: Sequence[Run], records: Iterable[dict[str, Any]]) -> dict[str, float | None]:
    """Seconds that each run will take, by key; None where nothing has finished yet.

    The median of finished runs of the same task and method, else of the method, of the task, of all.
    """
    records = [r for r in records if r.get("status") == "finished" and r.get("wall_seconds")]
    alike = (
        lambda a, b: a["task"] == b.task and a["method"] == b.method,
        lambda a, b: a["method"] == b.method,
        lambda a, b: a["task"] == b.task,
        lambda a, b: True,
    )
    out: dict[str, float | None] = {}
    for run in runs:
        found = next(filter(None, ([r["wall_seconds"] for r in records if f(r, run)] for f in alike)), None)
        out[run.key] = statistics.median(found) if found else None
    return out


def duration(seconds: float) -> str:
    """``1 h 05 min``, ``3 min 20 s``, ``8 s``."""
    seconds = round(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
    return f"{seconds // 60} min {seconds % 60:02d} s" if seconds >= 60 else f"{seconds} s"


def listing(runs: Sequence[Run], ledger: Ledger, workers: int = 1) -> str:
    """What ``--dry-run`` prints: each run, whether it is finished, its time or an estimate, and the sum."""
    runs = chain.with_firsts(runs)
    check_distinct(runs)
    records = ledger.read()
    finished = {r["key"]: r for r in records if r.get("status") == "finished"}
    failed = {r["key"] for r in records if r.get("status") == "failed"}
    todo = {r.key for r in chain.missing(runs, finished)}
    guess, lines, left, unknown = estimate(runs, records), [], 0.0, 0
    for run in runs:
        if run.key not in todo:
            lines.append(f"finished  {run.key}  {run.label}  ({duration(finished[run.key].get('wall_seconds', 0))})")
            continue
        seconds = guess[run.key]
        unknown += seconds is None
        left += seconds or 0.0
        word = "again" if run.key in finished else "failed" if run.key in failed else "to run"  # a checkpoint is gone
        about = "" if seconds is None else f"  (about {duration(seconds)})"
        lines.append(f"{word:<8}  {run.key}  {run.label}{about}")
    time_left = "no finished run to estimate the time from" if unknown else f"about {duration(left / workers)}"
    count = f"{len(runs)} runs, {len(runs) - len(todo)} finished, {len(todo)} to run"
    lines.append(count + (f": {time_left}" if todo else ""))
    return "\n".join(lines)
