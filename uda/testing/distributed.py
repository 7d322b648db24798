"""The check under two processes: DistributedDataParallel with gloo on the CPU."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uda.discovery import make_plugin
from uda.testing.bench import Bench
from uda.testing.report import CheckFailed, Report

WORLD = 2
_TOO_LONG = "it had not finished after {:g} s: one process waits for the other"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


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


def _environment() -> dict[str, str]:
    """That of a rank, without its number and without what a cluster says of another job."""
    other = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(other)}
    env |= {
        "NODE_RANK": "0", "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return {k: v for k, v in env.items() if k not in ("PYTEST_CURRENT_TEST", "LOCAL_RANK", "RANK")}


def _launch(payload: Path, timeout: float) -> tuple[str, list[str]]:
    """Run both processes; gives what went wrong (``""`` for nothing) and the end of each one's output."""
    logs = [payload.parent / f"log{rank}.txt" for rank in range(WORLD)]
    command = [sys.executable, "-m", "uda.testing.rank", str(payload)]
    wrong, failed = (_forked if hasattr(os, "fork") else _spawned)(command, logs, timeout)
    if failed and not wrong:
        wrong = f"process {failed[0]} failed"
    order = failed + [r for r in range(WORLD) if r not in failed]
    return wrong, [logs[r].read_text(errors="replace")[-2500:] if logs[r].is_file() else "" for r in order]


def _forked(command: list[str], logs: list[Path], timeout: float) -> tuple[str, list[int]]:
    """One process imports for both and forks: the imports are most of the time of a check."""
    with logs[0].open("wb") as log:
        process = subprocess.Popen(
            [*command, *map(str, logs)], env=_environment(), stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        return _TOO_LONG.format(timeout), []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "", [] if code == 0 else [max(code - 10, 0)]


def _spawned(command: list[str], logs: list[Path], timeout: float) -> tuple[str, list[int]]:
    """A process a rank, where there is no fork."""
    env, processes = _environment(), []
    for rank, path in enumerate(logs):
        with path.open("wb") as log:
            mine = {**env, "LOCAL_RANK": str(rank), "RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=mine, stdout=log, stderr=subprocess.STDOUT))
    wrong, end = "", time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() not in (None, 0) for p in processes):  # its partner would wait for ever
                time.sleep(2)
                break
            if time.monotonic() > end:
                wrong = _TOO_LONG.format(timeout)
                break
            time.sleep(0.05)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
    return wrong, [rank for rank, p in enumerate(processes) if p.returncode > 0]


def ddp(bench: Bench, report: Report, timeout: float = 180.0) -> None:
    """Two processes train without an error and hold equal parameters and buffers after every batch."""
    check_together([bench], timeout)


def check_together(benches: Sequence[Bench], timeout: float = 180.0) -> None:
    """Train each plugin in turn under one pair of processes, whose start is most of the time of a check.

    Args:
        benches: of the plugins; files go to the folder of the first.
        timeout: seconds for all.

    Raises:
        CheckFailed: of the first plugin that fails.
    """
    folder = Path(benches[0].folder)
    payload = _payload(benches, folder)
    wrong, outputs = _launch(payload, timeout)
    if "address already in use" in outputs[0].lower():  # another process took the free port in between
        wrong, outputs = _launch(payload, timeout)
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
