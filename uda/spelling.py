"""Names in a config, checked before the parser sees them: a slip gets one line with the nearest names.

The check walks along the type hints of the constructors: ``model`` is :class:`uda.UDA`, ``data`` the data
module, ``trainer`` Lightning's; wherever a hint allows a class, ``class_path`` and ``init_args`` are checked
against it.
Short class names are replaced by full paths on the way, plugin names by those of the registry.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

import yaml

from uda.discovery import registry
from uda.errors import UDAError, nearest
from uda.plugin import Plugin

_SPEC = {"class_path", "init_args", "dict_kwargs"}


# ------------------------------------------------------------------------------------------------- type hints


def parameters(owner: Any) -> tuple[dict[str, Any], bool]:
    """Parameters with their type hints, and whether any other name is taken too (``**kwargs``)."""
    call = owner.__init__ if isinstance(owner, type) else owner
    try:
        found = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return {}, True
    try:
        hints = typing.get_type_hints(call)
    except Exception:  # a hint that cannot be resolved leaves the check of values to the parser
        hints = {}
    named = {
        n: hints.get(n, Any)
        for n, p in found.items()
        if n != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }
    return named, any(p.kind is p.VAR_KEYWORD for p in found.values())


def _parts(hint: Any) -> list[Any]:
    """Members of a union; the hint itself otherwise."""
    if typing.get_origin(hint) in (typing.Union, __import__("types").UnionType):
        return [p for member in typing.get_args(hint) for p in _parts(member)]
    return [hint]


def classes_of(hint: Any) -> list[type]:
    """Classes that a value may be given as by ``class_path``."""
    out = []
    for part in _parts(hint):
        if typing.get_origin(part) is collections.abc.Callable:
            arguments = typing.get_args(part)
            out += classes_of(arguments[1]) if len(arguments) == 2 else []
        elif (
            isinstance(part, type)
            and part is not Any  # which is a class, and takes plain text as well
            and part.__module__ != "builtins"
            and not hasattr(part, "__dataclass_fields__")
        ):
            out.append(part)
    return out


def _item(hint: Any, container: type) -> Any:
    """Hint of the values of a dict or the members of a list that ``hint`` allows, or None."""
    for part in _parts(hint):
        origin = typing.get_origin(part)
        if isinstance(origin, type) and issubclass(container, origin) and typing.get_args(part):
            return typing.get_args(part)[-1]
    return None


def _subclasses(base: type) -> dict[str, list[type]]:
    found: dict[str, list[type]] = {}
    todo, seen = [base], set()
    while todo:
        cls = todo.pop()
        if cls not in seen:
            seen.add(cls)
            todo += cls.__subclasses__()
            if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
                found.setdefault(cls.__name__, []).append(cls)
    return found


def path_of(cls: type) -> str:
    """Full class path."""
    return f"{cls.__module__}.{cls.__qualname__}"


def resolve(name: Any, bases: list[type], where: str) -> type | None:
    """The class of a short name or a path; None where the parser has to decide.

    Raises:
        UDAError: unknown name or path, or a class of the wrong kind, with near names.
    """
    if not isinstance(name, str):
        raise UDAError(f"{where}: class_path is {name!r}, not the name of a class.")
    if any(issubclass(b, Plugin) for b in bases):
        try:
            return registry().get(name)
        except UDAError as error:
            raise UDAError(f"{where}: {error}") from error
    known: dict[str, list[type]] = {}
    for base in bases:
        for key, found in _subclasses(base).items():
            known.setdefault(key, []).extend(found)
    if "." not in name:
        if name in known:
            return known[name][0] if len(known[name]) == 1 else None
        kind = " or ".join(b.__name__ for b in bases)
        raise UDAError(
            f"{where}: unknown {kind} {name!r}. {nearest(name, known)} A full class path works as well."
        )
    module, _, attribute = name.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        close = difflib.get_close_matches(attribute, known, n=3, cutoff=0.6)
        hint = f" Did you mean {' or '.join(repr(path_of(known[c][0])) for c in close)}?" if close else ""
        raise UDAError(f"{where}: {name!r} cannot be imported: {error}.{hint}") from error
    if isinstance(cls, type) and not issubclass(cls, tuple(bases)):
        raise UDAError(f"{where}: {name!r} is no {' or '.join(b.__name__ for b in bases)}.")
    return cls if isinstance(cls, type) else None


# ------------------------------------------------------------------------------------------------- values


def check_arguments(owner: Any, given: dict[str, Any], where: str, extra: tuple[str, ...] = ()) -> None:
    """Check the names in ``given`` against the constructor of ``owner``, and nested values, in place."""
    known, anything = parameters(owner)
    for name, value in given.items():
        if name not in known and name not in extra and not anything:
            raise UDAError(f"{where}: {owner.__name__} has no argument {name!r}. {nearest(str(name), known)}")
        if name in known:
            given[name] = check_value(known[name], value, f"{where}.{name}")


def check_value(hint: Any, value: Any, where: str) -> Any:
    """Check one value, and give it back with class names made full."""
    bases = classes_of(hint)
    if isinstance(value, str) and bases and str not in _parts(hint):
        cls = resolve(value, bases, where)
        return value if cls is None else {"class_path": path_of(cls)}
    if isinstance(value, dict) and "class_path" in value:
        cls = resolve(value["class_path"], bases, where) if bases else None
        if wrong := sorted(set(map(str, value)) - _SPEC):
            hint_text = f"Put it under init_args: {{{wrong[0]}: ...}}." if cls is not None else ""
            raise UDAError(
                f"{where}: unknown key {wrong[0]!r} beside class_path. "
                f"{hint_text or nearest(wrong[0], _SPEC)}"
            )
        if cls is None:
            return value
        value = {**value, "class_path": path_of(cls)}
        if isinstance(value.get("init_args"), dict):
            value["init_args"] = dict(value["init_args"])
            first = ("params",) if typing.get_origin(_parts(hint)[0]) is collections.abc.Callable else ()
            check_arguments(cls, value["init_args"], where, first)
        return value
    if isinstance(value, dict) and (item := _item(hint, dict)) is not None:
        if classes_of(item) and (
            bare := [k for k, v in value.items() if isinstance(v, dict) and "class_path" not in v]
        ):
            raise UDAError(
                f"{where}.{bare[0]}: class_path is missing. "
                f"Write {bare[0]}: {{class_path: ..., init_args: ...}}."
            )
        return {k: check_value(item, v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list) and (item := _item(hint, list)) is not None:
        return [check_value(item, v, f"{where}[{i}]") for i, v in enumerate(value)]
    return value


# -------------------------------------------------------------------------------------------------- files


def load_yaml(path: str) -> dict[str, Any]:
    """A config file.

    Raises:
        UDAError: no such file (with the nearest ones of its folder), bad YAML (with line), or no mapping.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UDAError(f"--config: no file {path!r}. {_near_files(file)}")
    try:
        config = yaml.safe_load(file.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UDAError(f"{path}{line}: no valid YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(config, dict):
        raise UDAError(f"{path}: a config is a mapping with the keys model, data and trainer.")
    return config


def _near_files(file: Path) -> str:
    folder = file.parent
    if not folder.is_dir():
        return f"There is no folder {str(folder)!r} either (looked from {Path.cwd()})."
    names = sorted(p.name for p in folder.iterdir() if p.suffix in (".yaml", ".yml", ".json"))
    close = difflib.get_close_matches(file.name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(str(folder / c)) for c in close)}?"
    return f"That folder has {', '.join(names[:10])}." if names else "That folder has no config files."
