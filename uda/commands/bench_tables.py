"""Tables from suites and ledgers: their options, on the command line and in documents, and their text."""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from uda.bench.ledger import Ledger
from uda.bench.suite import Suite
from uda.errors import UDAError, nearest
from uda.metrics.names import MEASURES


def table_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a table, on the command line and in the marker of a document."""
    from uda.bench.render import FORMATS
    from uda.bench.statistics import TESTS
    from uda.bench.tables import FIGURES

    parser.add_argument(
        "source", nargs="*", metavar="SUITE|LEDGER", help="a suite's YAML file, or a .jsonl ledger; several for suites"
    )
    kinds = (
        "methods x tasks; the three figures side by side; what the label-free scores are worth; methods x suites with "
        "the gain over source_only"
    )
    parser.add_argument("--kind", choices=("accuracy", "figures", "scores", "suites"), default="accuracy", help=kinds)
    parser.add_argument("--figure", choices=FIGURES, default="last")
    parser.add_argument("--measure", choices=tuple(MEASURES), help="the headline of the runs' setting")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument(
        "--test", choices=tuple(TESTS), default="wilcoxon", help="paired test behind the bold figures"
    )
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument(
        "--tasks", type=lambda s: s.split(","), help="names with commas between, in this order"
    )
    parser.add_argument(
        "--methods", type=lambda s: s.split(","), help="names with commas between, in this order"
    )


@functools.lru_cache(maxsize=64)
def _read(path: Path, *as_it_is: int) -> list[dict[str, Any]]:
    """Records of a ledger: a document shows several tables of one, and takes none of them to be changed."""
    return Ledger(path).read()


def records_of(source: str, folder: Path) -> tuple[list[dict[str, Any]], list[str] | None, list[str] | None]:
    """Records of a ledger, or of the current runs of a suite; then the order of tasks and of methods."""
    path = folder / source
    if not path.is_file():
        near = (
            [p.name for p in path.parent.glob("*") if p.suffix in (".yaml", ".jsonl")]
            if path.parent.is_dir()
            else []
        )
        raise UDAError(f"no suite or ledger {str(path)!r}. {nearest(path.name, near)}")
    if path.suffix not in (".yaml", ".yml"):
        return _read(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size), None, None
    suite = Suite.load(path)
    names = {r.key: r for r in suite.runs()}
    records = [r for r in Ledger(suite.ledger).read() if r["key"] in names]
    for r in records:  # a run that was renamed in the suite keeps its figures
        now = names[r["key"]]
        r |= {"suite": now.suite, "task": now.task, "method": now.method}
    return records, list(suite.tasks), list(suite.methods)


def made(args: argparse.Namespace, folder: Path = Path(".")) -> str:
    """The text of a table."""
    from uda.bench import tables
    from uda.bench.render import render

    if not args.source or (len(args.source) > 1 and args.kind not in ("suites", "scores")):
        raise UDAError("name a suite or a ledger (one; several for --kind suites or scores).")
    measure = args.measure or "target_accuracy"
    if args.kind == "scores" and len(args.source) > 1:
        from uda.bench.scores import scores_over

        frames = [tables.frame(records_of(source, folder)[0], measure) for source in args.source]
        return render(scores_over(frames), args.format)
    if args.kind == "suites":
        from uda.bench.across import suites_table

        records = [r for source in args.source for r in records_of(source, folder)[0]]
        data = tables.frame(records, measure)
        wanted = tables.pick(tables.in_order(data["method"], None), args.methods, "method")
        table = suites_table(data, wanted, args.figure, test=args.test, alpha=args.alpha)
        return render(table, args.format)
    records, tasks, methods = records_of(args.source[0], folder)
    measure = args.measure or tables.headline_of(records)
    data = tables.frame(records, measure)
    tasks = tables.pick(tables.in_order(data["task"], tasks), args.tasks, "task")
    methods = tables.pick(tables.in_order(data["method"], methods), args.methods, "method")
    if args.kind == "figures":
        table = tables.figures_table(data, tasks, methods, measure)
    elif args.kind == "scores":
        from uda.bench.scores import scores_table

        table = scores_table(data, tasks, methods)
    else:
        table = tables.accuracy_table(data, args.figure, tasks, methods, args.test, args.alpha, measure)
    return render(table, args.format)


def made_from_marker(words: list[str], folder: Path) -> str:
    """The text of a table in a document; paths are relative to the document."""
    parser = argparse.ArgumentParser("<!-- uda-bench: LEDGER OPTIONS -->", exit_on_error=False)
    table_arguments(parser)
    try:
        return made(parser.parse_args(words), folder)
    except argparse.ArgumentError as error:
        raise UDAError(str(error)) from error
