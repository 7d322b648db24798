"""The check under two processes: DistributedDataParallel with gloo on the CPU."""

from __future__ import annotations

import inspect
import json
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uda.discovery import make_plugin
from uda.testing import rank
from uda.testing.bench import Bench
from uda.testing.forks import run_ranks
from uda.testing.report import CheckFailed, Report

WORLD = 2


def _case(bench: Bench, number: int, folder: Path) -> dict[str, Any]:
    """What a process needs to make the same runs of a plugin: files of the classes, and the pickled bench."""
    classes = [bench.cls, *(type(make_plugin(p)) for p in bench.partners.values())]
    try:
        blob = pickle.dumps(bench)
    except Exception as error:
        raise CheckFailed(
            bench.cls.__name__,
            "ddp",
            f"the plugin class cannot be sent to another process: {error}",
            "define it at the top level of a module (not inside a function), and pass plain arguments",
        ) from error
    path = folder / f"bench{number}.pickle"
    path.write_bytes(blob)
    return {
        "bench": str(path),
        "modules": [[c.__module__, inspect.getfile(c)] for c in classes],
        "unused": any(c.unused_parameters for c in classes),
        "out": str(folder / f"case{number}-rank"),
    }


def _payload(benches: Sequence[Bench], folder: Path) -> Path:
    """File that both processes read."""
    cases = [_case(bench, number, folder) for number, bench in enumerate(benches)]
    path = folder / "payload.json"
    path.write_text(json.dumps({"sys_path": [p for p in sys.path if p], "cases": cases}))
    return path


def ddp(bench: Bench, report: Report, timeout: float = 180.0) -> None:
    """Two processes train without an error and hold equal parameters and buffers after every batch."""
    check_together([bench], timeout)


def check_together(benches: Sequence[Bench], timeout: float = 180.0) -> None:
    """Train each plugin in turn under one pair of processes.

    Args:
        benches: of the plugins; files go to the folder of the first.
        timeout: seconds for all.

    Raises:
        CheckFailed: of the first plugin that fails.
    """
    folder = Path(benches[0].folder)
    wrong, outputs = run_ranks(rank.main, str(_payload(benches, folder)), folder=folder, world=WORLD, timeout=timeout)
    for number, bench in enumerate(benches):
        files = [folder / f"case{number}-rank{r}.json" for r in range(WORLD)]
        if not all(f.is_file() for f in files):  # the one at which the run came to its end
            raise _ended(bench.cls.__name__, wrong, outputs[0])
        _compare(bench.cls.__name__, *(json.loads(f.read_text()) for f in files))
        for f in files:
            f.unlink()
    if wrong:
        raise _ended(benches[-1].cls.__name__, wrong, outputs[0])


def _ended(name: str, wrong: str, output: str) -> CheckFailed:
    remedy = "call collective operations (Bank.write, gather_rows) in all processes and in the same order"
    if wrong.startswith("process"):
        remedy = "its output tells why; the same run on one process is the check 'lifecycle'"
    if "unused" in output or "did not receive grad" in output:
        remedy = (
            "let every trainable parameter take part in each step's objectives, freeze it "
            "(requires_grad_(False)), or "
            "set unused_parameters = True on the class"
        )
    return CheckFailed(name, "ddp", f"{wrong}. Its last output:\n{output}", remedy)


def _compare(name: str, one: list[dict[str, str]], other: list[dict[str, str]]) -> None:
    """Raise where the fingerprints of the two ranks differ after a batch."""
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        if different := sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k)):
            raise CheckFailed(
                name,
                "ddp",
                f"after batch {number} the processes hold different values of {different[0]!r}",
                "write memories from gathered data only: uda.nn.Bank.write, or uda.nn.gather_rows before "
                "you write to a "
                "buffer; draw random numbers for shared state from a generator seeded alike on all processes",
            )
