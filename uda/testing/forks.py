"""Functions in processes of their own, which are forked from this one where that is safe.

A forked process has the imports of this one; those of torch and Lightning are most of the time of a short run.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

_OTHER_JOB = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_", "PYTEST_")
_RANK = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE")
_GRACE = 2.0  # seconds in which the partner of a rank that failed may end by itself


def can_fork() -> bool:
    """Whether a child that is forked from this process can train.

    Not beside an accelerator: autograd's threads, which one brings, do not live on in the child. Nor where a process
    group is open, whose connections both would use.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return sys.platform == "linux" and not distributed and not torch.accelerator.is_available()


def _context() -> Any:
    if can_fork():
        return multiprocessing.get_context("fork")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["uda.lightning_cli"])
    return context


def clean_environment() -> dict[str, str]:
    """That of this process, without what says of another job or rank, and on one thread."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_OTHER_JOB) and k not in _RANK}
    return {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def start(
    function: Callable[..., Any],
    *arguments: Any,
    output: Path,
    errors: Path | None = None,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> BaseProcess:
    """Start a function in a process and a session of its own, with random numbers that nobody has seeded.

    Args:
        function: at the top level of a module.
        arguments: of it; they can be pickled.
        output: file of its standard output; ``errors``: of its standard error, None: the same.
        environment: all variables; None: :func:`clean_environment`. What PYTHONPATH names is found first.
        folder: its working directory.

    Returns:
        The process; it ends with 0, with 1 after an exception, or with the code of ``sys.exit``.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # what is left in a buffer would be written by both
    environment = clean_environment() if environment is None else dict(environment)
    process = _context().Process(target=_inside, args=(function, arguments, output, errors, environment, folder))
    process.start()
    return process


def _inside(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    output: Path,
    errors: Path | None,
    environment: dict[str, str],
    folder: Path | None,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if hasattr(os, "setsid"):
        os.setsid()
    _redirect(output, errors)
    if folder is not None:
        os.chdir(folder)
    server = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if getattr(server, "_forkserver_pid", None):
        server.ensure_running = lambda: None  # it is the parent's, which sees to it, and serves this process as well
    _find_first([p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p])
    random.seed()
    np.random.seed()
    torch.seed()
    torch.set_num_threads(1)
    function(*arguments)


def _find_first(folders: list[str]) -> None:
    """Modules and distributions of these folders are found first, those too that are not in the parent's path."""
    new = [f for f in folders if f not in sys.path]
    sys.path[:0] = new
    if new:
        from uda.discovery import registry

        importlib.invalidate_caches()
        registry.cache_clear()


def command(words: list[str]) -> None:
    """``uda WORDS``: ends the process with its exit code."""
    from uda.cli import main

    sys.argv = ["uda", *words]
    sys.exit(main(words))


def own_tests(folder: str) -> None:
    """``pytest FOLDER`` with nothing of the surrounding run: ends the process with its exit code."""
    import pytest

    sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", folder]))


def run(
    function: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Run a function in a process of its own and wait for it, as ``subprocess.run`` does with a command.

    Args:
        function, arguments, environment: of :func:`start`.
        folder: its working directory; the files of its streams go beside it.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: it was stopped.
    """
    paths = [folder.parent / f"{folder.name}.{stream}" for stream in ("stdout", "stderr")]
    process = start(function, *arguments, output=paths[0], errors=paths[1], environment=environment, folder=folder)
    try:
        process.join(timeout)
        late = process.is_alive()
    finally:
        stop(process)
    out, err = (path.read_text(errors="replace") for path in paths)
    if late:
        raise subprocess.TimeoutExpired([function.__name__, *map(str, arguments)], timeout, out, err)
    return subprocess.CompletedProcess([function.__name__, *map(str, arguments)], process.exitcode, out, err)


def _redirect(output: Path, errors: Path | None) -> None:
    """Send both streams to files, also where a test runner has put its own in their place."""
    old = [sys.stdout, sys.stderr]
    for number, path in ((1, output), (2, errors)):
        if path is not None:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, number)
            os.close(file)
    if errors is None:
        os.dup2(1, 2)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    for logger in [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                with contextlib.suppress(AttributeError):  # of a handler that always looks it up
                    # not by setStream, which flushes the old one: that of a test which is over is closed
                    handler.stream = sys.stdout if handler.stream is old[0] else sys.stderr


def stop(process: BaseProcess) -> None:
    """End a process and all that it has started."""
    if process.is_alive():
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # where it had no session of its own yet
    process.join()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(
    function: Callable[..., Any], *arguments: Any, folder: Path, world: int = 2, timeout: float = 180.0
) -> tuple[str, list[str]]:
    """Run a function in several processes, in which a Lightning trainer of ``world`` devices finds its ranks.

    Args:
        function: at the top level of a module.
        arguments: of it; they can be pickled.
        folder: for what the processes print, ``log<rank>.txt``.
        world: number of processes.
        timeout: in seconds, for all.

    Returns:
        What went wrong (``""`` for nothing), and the end of each one's output, those that failed first.
    """
    logs = [folder / f"log{rank}.txt" for rank in range(world)]
    for _ in range(2):
        wrong, failed = _run_ranks(function, arguments, logs, timeout)
        order = failed + [r for r in range(world) if r not in failed]
        outputs = [logs[r].read_text(errors="replace")[-2500:] if logs[r].is_file() else "" for r in order]
        if "address already in use" not in outputs[0].lower():  # another process took the free port in between
            break
    return wrong, outputs


def _run_ranks(
    function: Callable[..., Any], arguments: tuple[Any, ...], logs: list[Path], timeout: float
) -> tuple[str, list[int]]:
    env = {
        **clean_environment(), "NODE_RANK": "0", "WORLD_SIZE": str(len(logs)), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }  # fmt: skip
    processes: list[BaseProcess] = []
    wrong, failed, end = "", [], time.monotonic() + timeout
    try:
        for rank, log in enumerate(logs):
            mine = {**env, "LOCAL_RANK": str(rank), "RANK": str(rank)}
            processes.append(start(function, *arguments, output=log, environment=mine))
        running = {p.sentinel: rank for rank, p in enumerate(processes)}
        while running:
            done = wait(list(running), max(0.0, end - time.monotonic()))
            if not done:
                wrong = wrong or f"it had not finished after {timeout:g} s: one process waits for the other"
                break
            for sentinel in done:
                rank = running.pop(sentinel)
                processes[rank].join()
                if processes[rank].exitcode:
                    failed.append(rank)
                    wrong = f"process {failed[0]} failed"
                    end = min(end, time.monotonic() + _GRACE)  # its partner would wait for ever
    finally:
        for process in processes:
            stop(process)
    return wrong, failed
