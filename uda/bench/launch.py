"""Start one run and wait for it: in a process forked from one that has torch imported, or in a fresh one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from uda.bench.suite import Run

#: imported once by the process that runs are forked from: seconds of start-up that a run does not pay
_PRELOAD = ["uda.lightning_cli"]
_START = threading.Lock()
#: processes of runs in progress, and whether they were told to stop
_RUNNING: dict[Any, bool] = {}


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        code: exit code; negative for a signal.
        seconds: wall time, start-up included.
        error: last lines of the log where the run failed.
        used: strings of the config that came from environment variables, see
            :func:`uda.bench.merge.expanded`.
    """

    code: int
    seconds: float
    error: str = ""
    used: dict[str, str] | None = None


#: What a suite is run with: takes the run, whether to begin anew, and environment variables.
Launch = Callable[[Run, bool, dict[str, str]], Outcome]


def prepare(run: Run, clean: bool) -> tuple[list[str], Path, dict[str, str]]:
    """Write the config of a run and make way for it.

    Args:
        run: of a suite.
        clean: begin anew even where an interrupted run has left a checkpoint.

    Returns:
        Arguments of ``uda``, the log file, and the strings that came from variables.
    """
    folder = run.folder
    config, used = run.expanded()
    folder.parent.mkdir(parents=True, exist_ok=True)
    written, log = Path(f"{folder}.yaml"), Path(f"{folder}.log")
    written.write_text(f"# {run.suite}: {run.label}\n" + yaml.safe_dump(config, sort_keys=False))
    argv = ["fit", "--config", str(written), "--run_dir", str(folder)]
    argv += [f"--seed_everything={run.seed}", f"--select_by={run.select_by}"]
    if not clean and (folder / "checkpoints" / "last.ckpt").is_file() and (folder / "run.json").is_file():
        argv += ["--ckpt_path", "last"]
    else:
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink(missing_ok=True)
    return argv, log, used


def last_lines(log: Path, count: int = 12) -> str:
    """The end of a log: what went wrong is there."""
    try:
        text = log.read_bytes()[-20_000:].decode(errors="replace")
    except OSError:
        return ""
    lines = [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return "\n".join(lines[-count:])


def forked(run: Run, clean: bool = False, environment: dict[str, str] | None = None) -> Outcome:
    """Run in a process forked from a server that has everything imported.

    The fork starts from a clean state, so that nothing of one run reaches another, and a crash takes
    nothing with it. The process ends when the one that asked for it is gone.
    """
    argv, log, used = prepare(run, clean)
    context = multiprocessing.get_context("forkserver")
    began = time.monotonic()
    with _START:
        context.set_forkserver_preload(_PRELOAD)
        process = context.Process(target=_forked, args=(argv, str(log), os.getcwd(), run.threads, environment or {}))
        process.start()
        _RUNNING[process] = False
    process.join()
    del _RUNNING[process]
    code = process.exitcode
    return Outcome(code, time.monotonic() - began, last_lines(log) if code else "", used)


def interrupt(kill: bool = False) -> None:
    """Tell all runs in progress, once, to write a checkpoint and stop; or end them at once."""
    with _START:
        for process, told in list(_RUNNING.items()):
            if kill:
                process.kill()
            elif not told and process.pid is not None:
                _RUNNING[process] = True
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)


def _forked(argv: list[str], log: str, cwd: str, threads: int, environment: dict[str, str]) -> None:
    """Body of the forked process."""
    os.setpgrp()  # a terminal's Ctrl-C goes to the suite alone, which hands it on once
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.environ.update(environment)
    os.chdir(cwd)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    import torch

    if threads:
        torch.set_num_threads(threads)
    from uda.cli import main

    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(143)


def fresh(run: Run, clean: bool = False, environment: dict[str, str] | None = None) -> Outcome:
    """Run as ``python -m uda.cli fit ...``: some seconds slower, for jobs of a cluster."""
    argv, log, used = prepare(run, clean)
    variables = {**os.environ, **(environment or {})}
    if run.threads:
        variables["OMP_NUM_THREADS"] = variables["MKL_NUM_THREADS"] = str(run.threads)
    began = time.monotonic()
    with log.open("a") as out:
        code = subprocess.run(
            [sys.executable, "-m", "uda.cli", *argv], stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, env=variables, check=False,
        ).returncode  # fmt: skip
    return Outcome(code, time.monotonic() - began, last_lines(log) if code else "", used)
