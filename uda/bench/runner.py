"""Run what a suite lacks, on this machine, by several workers."""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from uda.bench import chain
from uda.bench.claims import Claims
from uda.bench.launch import Launch, forked, interrupt
from uda.bench.ledger import Ledger
from uda.bench.record import ledger_line
from uda.bench.suite import Run, check_distinct
from uda.errors import UDAError

_POLL = 1.0  # seconds between two looks at runs that another process has


@dataclass
class Tally:
    """What a call of :func:`run_all` did: labels by outcome.

    ``others`` were done by another process; ``skipped`` start from a run that did not finish.
    """

    finished: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    interrupted: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def run_claimed(
    run: Run,
    ledger: Ledger,
    claims: Claims,
    launch: Launch,
    failures: int = 0,
    environment: dict[str, str] | None = None,
    stopped: threading.Event | None = None,
    wanted: Collection[str] = (),
) -> dict[str, Any] | None:
    """Do a run and put it into the ledger, unless it is done or somebody else is at it.

    Args:
        run: of a suite.
        ledger, claims: of the suite.
        launch: how a run is started.
        failures: how often it had failed before this call: one more, and another process has just tried.
        environment: further variables of the run's process.
        stopped: set when the suite is being stopped; a run that ends then is no failure.
        wanted: checkpoints that other runs start from: a finished run that lacks one is made anew.

    Returns:
        The ledger line; None where the run was not done here.
    """

    again = False

    def done() -> bool:
        nonlocal again
        records = [r for r in ledger.read() if r["key"] == run.key]
        failed, again = sum(r["status"] == "failed" for r in records), any(r["status"] == "finished" for r in records)
        return failed > failures or (again and chain.has_left(run, wanted))

    if not claims.take(run.key, done):
        return None
    with claims.beating(run.key):
        try:
            outcome = launch(run, failures > 0 or again, environment or {})
            if outcome.code and stopped is not None and stopped.is_set():
                return {"status": "interrupted"}
            line = ledger_line(run, outcome)
        except (UDAError, OSError) as error:  # a config that cannot be written, a full disk
            line = {
                "suite": run.suite, "task": run.task, "method": run.method, "seed": run.seed, "key": run.key,
                "status": "failed", "error": f"{type(error).__name__}: {error}", "config": run.config,
            }  # fmt: skip
        ledger.append(line)
        return line


def run_all(
    runs: Sequence[Run],
    ledger: Ledger,
    workers: int = 1,
    launch: Launch = forked,
    gpus: Sequence[str] = (),
    tell_target: bool = True,
) -> Tally:
    """Do all runs that the ledger lacks; failures are recorded and the rest goes on.

    Runs that another process has claimed are waited for, and taken over if that process dies. A run that starts from
    others waits for them, and is skipped where one of them does not finish.

    Args:
        runs: of a suite.
        ledger: of the suite.
        workers: runs at a time.
        launch: how a run is started.
        gpus: devices that the workers take in turn (``CUDA_VISIBLE_DEVICES``); empty: as they are.
        tell_target: print the target accuracy of each run.
    """
    runs = chain.with_firsts(runs)
    check_distinct(runs)
    finished, failures = ledger.finished(), ledger.failures()
    wanted = chain.wanted(runs, finished)
    queue = collections.deque(chain.missing(runs, finished))
    planned = {run.key for run in queue}
    total, tally, claims = len(queue), Tally(), Claims(ledger.path)
    lock, stopped, waiting, ended = threading.Lock(), threading.Event(), set(), set()

    def tell(run: Run, line: dict[str, Any] | None) -> None:
        status = "others" if line is None else line["status"]
        with lock:
            getattr(tally, status).append(run.label)
            ended.add(run.key)
            done = len(tally.finished) + len(tally.failed) + len(tally.others) + len(tally.skipped)
            print(
                f"[{done:>{len(str(total))}}/{total}] {run.label}: {_told(run, line, tell_target)}",
                flush=True,
            )

    def postpone(run: Run) -> None:
        queue.append(run)
        waiting.add(run.key)
        if all(r.key in waiting for r in list(queue)):
            stopped.wait(_POLL)

    def work(number: int) -> None:
        environment = {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {}
        while not stopped.is_set():
            try:
                run = queue.popleft()
            except IndexError:
                return
            if run.starts and (lacking := chain.waits_for(run, now := ledger.finished(), planned - ended)):
                first = lacking[0].key
                if first in ended or (first not in planned and claims.holder(first) is None):
                    tell(run, {"status": "skipped", "why": chain.why_skipped(*lacking, now)})
                else:
                    postpone(run)
                continue
            before = failures.get(run.key, 0)
            line = run_claimed(
                run, ledger, claims, launch, before, environment, stopped, wanted.get(run.key, ())
            )
            if line is None and claims.holder(run.key) is not None:
                postpone(run)
                continue
            if line is None and run.key not in ledger.finished() and ledger.failures().get(run.key, 0) <= before:
                queue.append(run)  # its holder has died
                continue
            tell(run, line)

    count = max(1, min(workers, total))
    _wait_for_all([lambda number=i: work(number) for i in range(count)], stopped)
    return tally


def _wait_for_all(works: Sequence[Callable[[], None]], stopped: threading.Event) -> None:
    """Do each work in a thread; Ctrl-C lets the runs in progress write a checkpoint, a second one ends them."""
    ended, errors = [threading.Event() for _ in works], []

    def guarded(work: Callable[[], None], end: threading.Event) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)
        finally:
            end.set()

    for work, end in zip(works, ended, strict=True):
        threading.Thread(target=guarded, args=(work, end), daemon=True).start()
    try:
        # no Thread.join: in Python 3.11 an interrupt in it marks a running thread as ended
        while not all(end.is_set() for end in ended):
            time.sleep(0.05)
    except KeyboardInterrupt:
        stopped.set()
        print("uda: stopping; runs in progress write a checkpoint", file=sys.stderr, flush=True)
        try:
            while not all(end.is_set() for end in ended):
                interrupt()
                time.sleep(0.05)
        except KeyboardInterrupt:
            interrupt(kill=True)
        raise
    if errors:
        raise errors[0]


def _told(run: Run, line: dict[str, Any] | None, target: bool) -> str:
    if line is None:
        return "done by another process"
    if line["status"] == "interrupted":
        return "interrupted"
    if line["status"] == "skipped":
        return f"skipped: {line['why']}"
    if line["status"] == "failed":
        return f"FAILED, log in {run.folder}.log\n    " + "\n    ".join(line["error"].splitlines()[-3:])
    headline = line.get("headline", "target_accuracy")
    accuracy = (line["metrics"].get(headline) or {}).get("last")
    figure = "" if accuracy is None or not target else f", target {100 * accuracy:.1f}"
    return f"{line['wall_seconds']:.1f} s{figure}"
