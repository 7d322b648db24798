"""The check under two processes: DistributedDataParallel with gloo on the CPU."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

from uda.discovery import make_plugin
from uda.testing.bench import Bench
from uda.testing.report import CheckFailed, Report

WORLD = 2


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _payload(bench: Bench) -> Path:
    """What a process needs to make the same runs: files of the classes, and the pickled bench."""
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
    folder = Path(bench.folder)
    (folder / "bench.pickle").write_bytes(blob)
    payload = {
        "bench": str(folder / "bench.pickle"),
        "modules": [[c.__module__, inspect.getfile(c)] for c in classes],
        "sys_path": [p for p in sys.path if p],
        "unused": any([bench.cls.unused_parameters, *(c.unused_parameters for c in classes)]),
        "out": str(folder / "rank"),
    }
    (folder / "payload.json").write_text(json.dumps(payload))
    return folder / "payload.json"


def _launch(payload: Path, timeout: float) -> tuple[str, list[str]]:
    """Run both processes; gives what went wrong (``""`` for nothing) and the end of each one's output."""
    port, folder = _free_port(), payload.parent
    logs = [folder / f"log{rank}.txt" for rank in range(WORLD)]
    processes = []
    for rank in range(WORLD):
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_"))
        }
        env |= {
            "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANK": str(rank),
        }  # fmt: skip
        env.pop("PYTEST_CURRENT_TEST", None)
        with logs[rank].open("wb") as log:
            command = [sys.executable, "-m", "uda.testing.rank", str(payload)]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    wrong, end = "", time.monotonic() + timeout
    try:
        while any(p.poll() is None for p in processes):
            if any(p.poll() not in (None, 0) for p in processes):  # its partner would wait for ever
                time.sleep(2)
                break
            if time.monotonic() > end:
                wrong = f"it had not finished after {timeout:g} s: one process waits for the other"
                break
            time.sleep(0.05)
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
            p.wait()
    failed = [rank for rank, p in enumerate(processes) if p.returncode > 0]
    if failed and not wrong:
        wrong = f"process {failed[0]} failed"
    order = failed + [r for r in range(WORLD) if r not in failed]
    return wrong, [logs[r].read_text(errors="replace")[-2500:] for r in order]


def ddp(bench: Bench, report: Report, timeout: float = 180.0) -> None:
    """Two processes train without an error and hold equal parameters and buffers after every batch."""
    name, payload = bench.cls.__name__, _payload(bench)
    wrong, outputs = _launch(payload, timeout)
    if "address already in use" in outputs[0].lower():  # another process took the free port in between
        wrong, outputs = _launch(payload, timeout)
    if wrong:
        remedy = "call collective operations (Bank.write, gather_rows) in all processes and in the same order"
        if wrong.startswith("process"):
            remedy = "its output tells why; the same run on one process is the check 'lifecycle'"
        if "unused" in outputs[0] or "did not receive grad" in outputs[0]:
            remedy = (
                "let every trainable parameter take part in each step's objectives, freeze it "
                "(requires_grad_(False)), or "
                "set unused_parameters = True on the class"
            )
        raise CheckFailed(name, "ddp", f"{wrong}. Its last output:\n{outputs[0]}", remedy)
    ranks = [json.loads((payload.parent / f"rank{r}.json").read_text()) for r in range(WORLD)]
    for number, (one, other) in enumerate(zip(*ranks, strict=True)):
        if different := sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k)):
            raise CheckFailed(
                name,
                "ddp",
                f"after batch {number} the processes hold different values of {different[0]!r}",
                "write memories from gathered data only: uda.nn.Bank.write, or uda.nn.gather_rows before "
                "you write to a "
                "buffer; draw random numbers for shared state from a generator seeded alike on all processes",
            )
    for r in range(WORLD):
        (payload.parent / f"rank{r}.json").unlink()
