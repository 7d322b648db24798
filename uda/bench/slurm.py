"""Runs as jobs of a cluster, by submitit: one array of jobs for a suite."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from uda.bench import chain
from uda.bench.claims import Claims
from uda.bench.launch import fresh
from uda.bench.ledger import Ledger
from uda.bench.runner import Tally, run_claimed
from uda.bench.suite import Run, check_distinct
from uda.errors import UDAError

#: what a job asks for where neither the suite nor the command line says; times in minutes
DEFAULTS = {
    "timeout_min": 240,
    "cpus_per_task": 4,
    "mem_gb": 16,
    "gpus_per_node": 1,
    "slurm_array_parallelism": 16,
}


def job(run: Run, ledger: Path, failures: int, wanted: Collection[str] = ()) -> str:
    """Body of a job: the run, if nobody else has done it; the node itself writes to the ledger."""
    line = run_claimed(run, Ledger(ledger), Claims(ledger), fresh, failures, wanted=wanted)
    return "others" if line is None else line["status"]


def submit_all(
    runs: Sequence[Run],
    ledger: Ledger,
    options: dict[str, Any],
    cluster: str | None = None,
    wait: bool = True,
) -> Tally:
    """Submit what the ledger lacks as one array; runs that start from others as further arrays, when those are done.

    A job that dies without a line (time limit, node failure) is found missing by the next call.

    Args:
        runs: of a suite.
        ledger: on a file system that all nodes share.
        options: of ``submitit``'s executor, over :data:`DEFAULTS`.
        cluster: ``slurm``, ``local`` (processes) or ``debug`` (in this process); None: slurm where there is
            one.
        wait: for the jobs to end; else the tally is empty, and only the first array is submitted.

    Raises:
        UDAError: submitit is not installed, or an option that it does not know.
    """
    try:
        import submitit
    except ImportError as error:
        raise UDAError("--executor submitit needs the package submitit: pip install uda-lightning[slurm]") from error
    runs = chain.with_firsts(runs)
    check_distinct(runs)
    todo = chain.missing(runs, ledger.finished())
    tally = Tally()
    if not todo:
        return tally
    executor = submitit.AutoExecutor(folder=todo[0].runs_dir / "jobs" / "%j", cluster=cluster)
    try:
        chosen = {**DEFAULTS, **options}
        if executor.cluster != "slurm":
            chosen = {k: v for k, v in chosen.items() if k == "timeout_min"}
        executor.update_parameters(name=f"uda-{todo[0].suite}"[:40], **chosen)
    except (NameError, TypeError) as error:
        raise UDAError(f"slurm options of the suite: {error}") from error
    while todo:
        finished = ledger.finished()
        planned, claims = {r.key for r in todo}, Claims(ledger.path)
        ready = [r for r in todo if chain.waits_for(r, finished, planned) is None]
        if not ready:  # what they start from has been tried
            for run in todo:
                first, checkpoint = chain.waits_for(run, finished, planned)
                if claims.holder(first.key) is not None:
                    print(f"{run.label}: another process makes {first.label}, its start: call again", flush=True)
                    tally.others.append(run.label)
                    continue
                print(f"{run.label}: skipped: {chain.why_skipped(first, checkpoint, finished)}", flush=True)
                tally.skipped.append(run.label)
            break
        todo = [r for r in todo if r not in ready]
        _submit(executor, ready, ledger, chain.wanted(runs, finished), tally, wait)
        if not wait:
            if todo:
                print(f"{len(todo)} runs start from these: call again when they are done", flush=True)
            break
    return tally


def _submit(
    executor: Any, runs: list[Run], ledger: Ledger, wanted: dict[str, set[str]], tally: Tally, wait: bool
) -> None:
    """One array, and its outcome."""
    path, failures = ledger.path.absolute(), ledger.failures()
    jobs = executor.map_array(
        job, runs, [path] * len(runs), [failures.get(r.key, 0) for r in runs], [wanted.get(r.key, ()) for r in runs]
    )
    print(f"submitted {len(jobs)} jobs: {jobs[0].job_id} ...", flush=True)
    for run, handle in zip(runs, jobs if wait else [], strict=wait):
        try:
            status = handle.result()
        except Exception as error:  # the job itself died: say so, and go on with the others
            status = "failed"
            print(f"{run.label}: job {handle.job_id}: {str(error).strip().splitlines()[-1]}", flush=True)
        getattr(tally, status).append(run.label)
        print(f"{run.label}: {status}", flush=True)
