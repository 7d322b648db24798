"""``uda bench``: run suites, make tables from ledgers, check those in documents, tune."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from uda.bench.ledger import Ledger
from uda.bench.suite import Suite
from uda.commands.bench_tables import made, made_from_marker, table_arguments
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError


def main(argv: list[str]) -> int:
    """``uda bench run|table|check|tune``.

    Returns:
        0; 1 where a run failed or a table in a document is not what its ledger says.
    """
    parser = argparse.ArgumentParser(
        "uda bench", description="Suites of runs, their ledger, and tables from it."
    )
    commands = parser.add_subparsers(dest="command", metavar="{run,table,check,tune}", required=True)
    run_arguments(commands.add_parser("run", help="run what a suite lacks"))
    table = commands.add_parser("table", help="a table from a suite's ledger")
    table_arguments(table)
    table.add_argument("-o", "--output", type=Path, help="write to this file")
    table.add_argument(
        "--update", nargs="+", metavar="DOC", help="rewrite the tables in documents and folders instead"
    )
    check = commands.add_parser("check", help="make all tables in documents anew; fail where a text differs")
    check.add_argument("documents", nargs="*", default=["docs"], help="Markdown files and folders (docs)")
    tune_arguments(commands.add_parser("tune", help="search a plugin's settings by a label-free score"))
    args = parser.parse_args(argv[1:])
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": run, "table": print_table, "check": check_documents, "tune": tune,
    }  # fmt: skip
    return actions[args.command](args)


# ------------------------------------------------------------------------------------------------- run


def suite_arguments(parser: argparse.ArgumentParser) -> None:
    """What all commands that run a suite take."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override in every run"
    )
    parser.add_argument("--runs-dir", type=Path, help="folder of the runs (runs/bench/<suite>)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--gpus", default="", help="devices that workers take in turn: 0,1,2")


def run_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``uda bench run``."""
    parser.add_argument("suite", type=Path, metavar="SUITE", help="YAML file")
    suite_arguments(parser)
    parser.add_argument("--ledger", type=Path, help="(<runs-dir>/ledger.jsonl)")
    parser.add_argument("--seeds", help="in place of the suite's: 0,1,2")
    parser.add_argument(
        "--only", metavar="PATTERN", help="runs whose task/method/seed fits: 'A->C/*', dann, */*/0"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and estimate their time")
    parser.add_argument("--executor", choices=("local", "submitit"), default="local")
    parser.add_argument(
        "--cluster", choices=("slurm", "local", "debug"), help="of submitit (slurm if there is one)"
    )
    parser.add_argument("--no-wait", action="store_true", help="submit, and leave")


def numbers(text: str | None) -> list[int] | None:
    """``0,1,2`` as a list."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UDAError(f"--seeds {text!r}: whole numbers with commas between are needed.") from error


def overrides(words: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` words as a mapping; values are YAML."""
    out = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UDAError(f"--set {word!r}: write KEY=VALUE, such as trainer.max_epochs=3.")
        out[key.lstrip("-")] = yaml.safe_load(value)
    return out


def run(args: argparse.Namespace) -> int:
    """``uda bench run``."""
    from uda.bench.listing import listing
    from uda.bench.runner import run_all

    suite = Suite.load(
        args.suite, overrides(args.set), runs_dir=args.runs_dir, ledger=args.ledger, seeds=numbers(args.seeds)
    )
    runs, ledger = suite.runs(args.only), Ledger(suite.ledger)
    if args.dry_run:
        print(listing(runs, ledger, args.workers))
        return 0
    if args.executor == "submitit":
        from uda.bench.slurm import submit_all

        tally = submit_all(runs, ledger, suite.slurm, args.cluster, not args.no_wait)
    else:
        tally = run_all(runs, ledger, args.workers, gpus=[g for g in args.gpus.split(",") if g])
    here = (tally.finished, tally.failed, tally.interrupted, tally.skipped)
    done = f"{len(tally.finished)} runs finished, {len(tally.failed)} failed"
    if tally.skipped:
        done += f", {len(tally.skipped)} skipped (they start from one that did not finish)"
    print(f"{done}, {len(runs) - sum(map(len, here))} were done before or elsewhere; ledger: {ledger.path}")
    if tally.failed:
        print(f"uda: failed: {', '.join(tally.failed)}", file=sys.stderr)
    return 1 if tally.failed or tally.skipped else 0


# ----------------------------------------------------------------------------------------------- table


def print_table(args: argparse.Namespace) -> int:
    """``uda bench table``."""
    if args.update:
        from uda.bench.documents import update

        changed = update(args.update, made_from_marker)
        print("\n".join(f"updated {path}" for path in changed) or "all tables are up to date")
        return 0
    text = made(args)
    if args.output is None:
        print(text, end="")
    else:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    return 0


def check_documents(args: argparse.Namespace) -> int:
    """``uda bench check``."""
    from uda.bench.documents import check

    count, differences = check(args.documents, made_from_marker)
    for difference in differences:
        print(difference)
    if differences:
        print(
            f"uda: {len(differences)} document(s) do not say what their ledgers say; if the ledger is right: "
            "uda bench table --update " + " ".join(args.documents), file=sys.stderr,
        )  # fmt: skip
        return 1
    print(f"{count} tables say what their ledgers say")
    return 0


# ------------------------------------------------------------------------------------------------ tune


def tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``uda bench tune``."""
    parser.add_argument("source", type=Path, metavar="SUITE|CONFIG", help="a suite, or a config of `uda fit`")
    parser.add_argument("--plugin", required=True, metavar="KEY", help="key in model.plugins")
    parser.add_argument(
        "--trials", type=int, default=20, help="in all; a study that was stopped goes on (20)"
    )
    parser.add_argument("--score", default=DEFAULT_SCORE, help=f"label-free score to make large ({DEFAULT_SCORE})")
    parser.add_argument("--method", help="of the suite; needed where it has several with this plugin")
    parser.add_argument(
        "--tasks", type=lambda s: s.split(","), help="of the suite (all): the score is their mean"
    )
    parser.add_argument("--seeds", default="0", help="the score is their mean (0)")
    suite_arguments(parser)


def tune(args: argparse.Namespace) -> int:
    """``uda bench tune``."""
    from uda.bench.tune import Study

    study = Study.of(
        args.source, args.plugin, args.score, method=args.method, tasks=args.tasks, seeds=numbers(args.seeds),
        overrides=overrides(args.set), runs_dir=args.runs_dir,
    )  # fmt: skip
    study.run(args.trials, args.workers, [g for g in args.gpus.split(",") if g])
    print(study.report())
    return 0
