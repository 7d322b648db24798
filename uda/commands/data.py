"""``uda data``: known benchmarks, their layout, a check of a copy, and how to get one."""

from __future__ import annotations

import argparse
import importlib
import textwrap
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

from uda.errors import UDAError, nearest


def main(argv: list[str]) -> int:
    """``uda data``, ``uda data show NAME``, ``uda data check NAME ROOT``, ``uda data download NAME ROOT``.

    Returns:
        0, or 1 where a check found something.
    """
    parser = argparse.ArgumentParser("uda data", description="Benchmarks of the field.")
    commands = parser.add_subparsers(dest="command", metavar="{show,check,download}")
    for name, text in (
        ("show", "layout, domains, classes and licence"),
        ("check", "whether the folder ROOT is complete"),
        ("download", "fetch into ROOT, or say where to get it"),
    ):
        sub = commands.add_parser(name, help=text)
        sub.add_argument("name", metavar="NAME")
        if name != "show":
            sub.add_argument("root", metavar="ROOT")
    args = parser.parse_args(argv[1:])
    module = benchmarks()
    if args.command is None:
        for name, known in module.BENCHMARKS.items():
            print(f"{name:<16} {known.summary}")
        return 0
    known = named(module.BENCHMARKS, args.name)
    if args.command == "show":
        print(known.describe())
        return 0
    if args.command == "check":
        return report(args.name, known.check(args.root))
    print(known.download(args.root))
    return 0


def benchmarks() -> ModuleType:
    """The list of benchmarks."""
    try:
        return importlib.import_module("uda.data.benchmarks")
    except ModuleNotFoundError as error:
        raise UDAError("This installation of uda lists no benchmarks.") from error


def named(known: Mapping[str, Any], name: str) -> Any:
    """A benchmark by name.

    Raises:
        UDAError: unknown, with the nearest names.
    """
    if name not in known:
        raise UDAError(f"Unknown benchmark {name!r}. {nearest(name, known)} `uda data` lists all.")
    return known[name]


def report(name: str, problems: Iterable[str]) -> int:
    """Print what a check found; 1 if anything."""
    problems = list(problems)
    for problem in problems:
        print(textwrap.indent(str(problem), "- ").replace("\n- ", "\n  "))
    print(f"{name}: {f'{len(problems)} problem(s)' if problems else 'complete'}")
    return 1 if problems else 0
