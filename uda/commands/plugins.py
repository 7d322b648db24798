"""``uda plugins``: what is installed, what a plugin takes, and a new one to start from."""

from __future__ import annotations

import argparse
import inspect
import json
import warnings
from pathlib import Path
from typing import Any

from uda.discovery import Registry, registry


def main(argv: list[str]) -> int:
    """``uda plugins [--json]``, ``uda plugins show NAME``, ``uda plugins new NAME [--dir D]``."""
    parser = argparse.ArgumentParser("uda plugins", description="Methods that are installed.")
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a table")
    commands = parser.add_subparsers(dest="command", metavar="{show,new}")
    show = commands.add_parser("show", help="docstring and arguments of one plugin")
    show.add_argument("name", metavar="NAME")
    new = commands.add_parser("new", help="write a plugin distribution to start from")
    new.add_argument("name", metavar="NAME")
    new.add_argument("--dir", type=Path, default=Path("."), help="folder to write into (here)")
    args = parser.parse_args(argv[1:])
    if args.command == "new":
        from uda.scaffold import new_plugin

        print(new_plugin(args.name, args.dir))
        return 0
    with warnings.catch_warnings():  # what is broken is in the table
        warnings.simplefilter("ignore")
        found = registry()
    if args.command == "show":
        print(describe_plugin(found, args.name))
    elif args.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_table(found)
    return 0


def as_json(found: Registry) -> dict[str, Any]:
    """Everything that discovery found, as plain data."""
    return {
        "plugins": [f.row() for f in found.plugins.values()],
        "broken": found.broken,
        "clashes": {name: [f.row() for f in several] for name, several in found.clashes.items()},
    }


def print_table(found: Registry) -> None:
    """One row a plugin, then what could not be loaded and which names clash."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    table = Table("plugin", "distribution", "hooks", "settings", "summary")
    for column in table.columns[:2]:
        column.no_wrap = True
    for f in found.plugins.values():
        row = f.row()
        origin = f"{f.distribution} {f.version}"
        table.add_row(f.name, origin, ", ".join(row["hooks"]), ", ".join(row["settings"]), row["summary"])
    if found.plugins:
        console.print(table)
    if found.bare:
        console.print(
            "No plugin distribution is installed: pip install one, for example plugins/uda-adversarial."
        )
    for where, reason in found.broken.items():
        console.print(f"broken: {where}: {reason}", markup=False, style="red")
    for name, several in found.clashes.items():
        console.print(
            f"clash: {name} is offered by more than one distribution; use a full class path:", style="red"
        )
        for f in several:
            console.print(f"  {f.row()['class_path']}  ({f.distribution} {f.version})", markup=False)


def describe_plugin(found: Registry, name: str) -> str:
    """Docstring, origin, hooks and arguments of a plugin.

    Raises:
        UDAError: unknown or ambiguous name.
    """
    cls = found.get(name)
    row = next((f.row() for f in found.plugins.values() if f.cls is cls), None)
    title = f"{cls.__module__}.{cls.__qualname__}"
    origin = f"{row['distribution']} {row['version']}" if row else "no installed distribution"
    from uda.hooks import hooks_of

    lines = [
        f"{title}  ({origin})",
        "",
        inspect.getdoc(cls) or "",
        "",
        f"hooks: {', '.join(hooks_of(cls)) or 'none'}",
    ]
    lines += [f"settings: {', '.join(cls.settings)}"]
    for flag in ("manual", "reruns_backbone", "unused_parameters", "averages"):
        if getattr(cls, flag):
            lines.append(f"{flag}: true")
    lines += ["", "arguments:"]
    parameters = [p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"]
    for p in parameters:
        hint = "" if p.annotation is p.empty else f": {inspect.formatannotation(p.annotation).strip(chr(39))}"
        default = "  (required)" if p.default is p.empty else f" = {p.default!r}"
        lines.append(f"  {p.name}{hint}{default}")
    return "\n".join(lines if parameters else lines[:-2])
