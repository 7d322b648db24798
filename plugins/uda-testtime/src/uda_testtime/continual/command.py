"""``uda continual``: a sequence of unlabelled domains, each adapted to in turn, and what is learned and kept."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uda.errors import UDAError, check_writable

if TYPE_CHECKING:
    from uda_testtime.continual.plan import Plan

RECORD = "continual.json"


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; others are settings of the fits, as in ``uda fit``."""
    out = argparse.ArgumentParser(
        "uda continual", allow_abbrev=False, description=(
            "Train on the labelled source, then adapt to one unlabelled domain after the other, each from the model "
            "before it; after each stage measure all domains: adaptation, generalisation, forgetting."),
        epilog="--config FILE, again for the method that adapts, and further settings as in `uda fit`. With "
        "--model.init_from=CKPT the source's stage is that checkpoint. Target labels serve the figures named oracle.",
    )  # fmt: skip
    out.add_argument("--shifts", nargs="+", metavar="DOMAIN", required=True, help="the domains, in order")
    out.add_argument("--generalise", metavar="FILE", help=(
        "overlay of a second fit a stage, in the place of the method, on the labels that the adapted model gives; its "
        "model is handed on (configs/methods/codag.yaml)"))  # fmt: skip
    out.add_argument("--memory", type=int, default=200, help="exemplars of all earlier domains, for --generalise (200)")
    out.add_argument("-o", "--output", type=Path, help="folder (runs/continual_<configs>/seed<seed>)")
    out.add_argument("--resume", action="store_true", help="go on with what the folder lacks")
    out.add_argument("--in_process", action="store_true", help="fits in this process: quicker to start, one device")
    return out


def main(argv: list[str]) -> int:
    """``uda continual --config FILE --shifts A B C [--generalise FILE] [options]``.

    Returns:
        0; the code of a fit that stopped before its end (130 after Ctrl-C).
    """
    args, rest = parser().parse_known_args(argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UDAError("uda continual starts the fits itself: run it once, and set trainer.devices for each of them.")
    from uda_testtime.continual.plan import Plan

    plan = Plan.make(rest, args.shifts, args.generalise, args.memory, args.output)
    check_folder(plan, args.resume)
    from uda_testtime.continual.stages import Sequence, Stopped

    sequence = Sequence(plan, here if args.in_process else apart)
    sequence.check()
    new = not plan.out.exists()
    plan.out.mkdir(parents=True, exist_ok=True)
    (plan.out / RECORD).write_text(json.dumps(plan.told(), indent=2) + "\n")
    try:
        summary = sequence.run()
    except Stopped as stop:
        if new and stop.code not in (130, 143) and not any(plan.out.rglob("checkpoints")):
            shutil.rmtree(plan.out)  # the first fit was refused: nothing to go on with
            return stop.code
        told = "was stopped" if stop.code in (130, 143) else f"failed with code {stop.code}"
        print(f"uda continual: a fit {told}; go on: the same command with --resume", file=sys.stderr)
        return stop.code
    show(summary)
    print(f"{plan.out / 'summary.json'}")
    return 0


def check_folder(plan: Plan, resume: bool) -> None:
    """Refuse a folder that is used, that cannot be one, or that was begun with other settings.

    Raises:
        UDAError: it is used and not to be resumed, is no folder, or was made with other settings.
    """
    check_writable("--output", plan.out)
    file = plan.out / RECORD
    if not resume:
        if plan.out.exists() and any(plan.out.iterdir()):
            raise UDAError(f"--output {plan.out}: it is used. Name another folder, or go on with --resume.")
        return
    if not file.is_file():
        raise UDAError(f"--resume: there is no {file}.")
    found, mine = json.loads(file.read_text()), plan.told()
    if other := [k for k in mine if found.get(k) != mine[k]]:
        raise UDAError(f"--resume: {plan.out} was begun with another {other[0]}: repeat the command that began it.")


def here(words: list[str]) -> int:
    """A command in this process."""
    from uda.cli import main as uda

    return uda(words)


def apart(words: list[str]) -> int:
    """A command in a process of its own."""
    try:
        return subprocess.run([sys.executable, "-m", "uda.cli", *words], check=False).returncode
    except KeyboardInterrupt:  # the fit has had it as well, and written its checkpoint
        return 130


def show(summary: dict[str, Any]) -> None:
    """The table at the end."""
    from rich.console import Console
    from rich.table import Table

    from uda.run.figures import percent

    names = [*(["source"] if summary["oracle_accuracies"][0]["source"] is not None else []), *summary["shifts"]]
    table = Table(title="accuracy, %, target labels: report only", title_justify="left", title_style="bold")
    for column in ("after", *names):
        table.add_column(column, justify="left" if column == "after" else "right")
    for stage, row in zip(summary["stages"], summary["oracle_accuracies"], strict=True):
        table.add_row(stage, *(percent(row.get(n)) for n in names))
    console, measures = Console(), summary["oracle_measures"]
    table.add_section()
    told = (("tda", "adaptation (TDA)"), ("tdg", "generalisation (TDG)"), ("fa", "earlier domains (FA)"))
    for key, text in told:
        table.add_row(text, *(percent(measures[key].get(n)) for n in names))
    console.print(table)
    console.print("mean: " + ", ".join(f"{k.upper()} {percent(v)}" for k, v in measures["mean"].items()))
