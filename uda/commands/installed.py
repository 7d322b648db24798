"""Commands that installed distributions bring: the entry-point group ``uda.commands``."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from uda.errors import UDAError, nearest

GROUP = "uda.commands"


@dataclass(frozen=True)
class Installed:
    """A command of a distribution: ``name = "module:function"``, the function called with ``[name, *arguments]``."""

    name: str
    entries: tuple[metadata.EntryPoint, ...]

    @property
    def summary(self) -> str:
        """What ``uda --help`` says: the first line of the module's docstring, which is read and not imported."""
        origin = " and ".join(_origin(e) for e in self.entries)
        line = docstring(self.entries[0].value.partition(":")[0]).partition("\n")[0].rstrip(".")
        _, colon, told = line.partition(": ")  # "``uda fuse``: several networks as one"
        return f"{told if colon else line} [{origin}]".strip()

    def load(self) -> Callable[[list[str]], int | None]:
        """The function.

        Raises:
            UDAError: several distributions offer the name, or the one that does cannot be imported.
        """
        if len(self.entries) > 1:
            origins = ", ".join(f"{e.value} ({_origin(e)})" for e in self.entries)
            raise UDAError(f"Command {self.name!r} is offered by {origins}. Uninstall one of these distributions.")
        entry = self.entries[0]
        try:
            found = entry.load()
        except (ImportError, AttributeError) as error:
            raise UDAError(
                f"Command {self.name!r} of {_origin(entry)} cannot be loaded ({entry.value}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if not callable(found):
            raise UDAError(f"Command {self.name!r} of {_origin(entry)}: {entry.value} is no function of argv.")
        return found


def _origin(entry: metadata.EntryPoint) -> str:
    return entry.dist.name if entry.dist else "unknown distribution"


def installed(taken: Iterable[str] = ()) -> dict[str, Installed]:
    """Commands of all installed distributions by name, none of them imported; names in ``taken`` are left out."""
    found: dict[str, dict[str, metadata.EntryPoint]] = {}
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        if entry.name not in taken:
            found.setdefault(entry.name, {})[entry.value] = entry  # a distribution on two paths is one
    return {name: Installed(name, tuple(entries.values())) for name, entries in found.items()}


def find(name: str, built_in: Iterable[str]) -> Callable[[list[str]], int | None]:
    """The function of an installed command.

    Raises:
        UDAError: there is none of that name, with the nearest of all.
    """
    found = installed(built_in)
    if name not in found:
        raise UDAError(f"unknown command {name!r}. {nearest(name, [*built_in, *found])} `uda --help` lists all.")
    return found[name].load()


def docstring(module: str) -> str:
    """Docstring of a module from its source; empty where there is no source. Neither it nor its package is imported."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        places = list(spec.submodule_search_locations or ())
        files = [Path(p).joinpath(*rest) for p in places] if rest else [Path(spec.origin).with_suffix("")]
        candidates = [f for base in files for f in (base.with_suffix(".py"), base / "__init__.py")]
        source = next(f for f in candidates if f.is_file()).read_text(encoding="utf-8")
        return ast.get_docstring(ast.parse(source)) or ""
    except (AttributeError, TypeError, StopIteration, OSError, SyntaxError, ValueError, ImportError):
        return ""
