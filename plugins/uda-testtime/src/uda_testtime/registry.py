"""Methods by name: every subclass of :class:`Method` in a module of this package; others by class path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from functools import cache
from typing import Any

from uda.errors import UDAError, nearest
from uda_testtime.method import Method


@cache
def methods() -> dict[str, type[Method]]:
    """Classes by name, in alphabetical order. A module that does not import is left out with a warning."""
    import uda_testtime

    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(uda_testtime.__path__):
        try:
            module = importlib.import_module(f"uda_testtime.{info.name}")
        except Exception as error:  # one broken method must not take the others along
            warnings.warn(f"uda_testtime.{info.name} is left out: {type(error).__name__}: {error}", stacklevel=2)
            continue
        for name, value in vars(module).items():
            own = isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
            if own and value is not Method and not name.startswith("_"):
                found[name] = value
    return dict(sorted(found.items()))


def method_class(name: str) -> type[Method]:
    """The class behind a name or a class path.

    Raises:
        UDAError: there is none.
    """
    if name in methods():
        return methods()[name]
    module, dot, last = name.rpartition(".")
    if not dot:
        raise UDAError(f"There is no test-time method {name!r}. {nearest(name, methods())}")
    try:
        found = getattr(importlib.import_module(module), last)
    except (ImportError, AttributeError) as error:
        raise UDAError(f"The test-time method {name!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UDAError(f"{name!r} is no subclass of uda_testtime.Method.")
    return found


def make_method(name: str, arguments: dict[str, Any] | None) -> Method:
    """The method with these arguments of its constructor.

    Raises:
        UDAError: no such method, or it has no such argument.
    """
    kind = method_class(name)
    known = inspect.signature(kind).parameters
    if strange := [n for n in arguments or {} if n not in known]:
        told = f"It takes {', '.join(known)}." if known else "It takes none."
        raise UDAError(
            f"{kind.__name__} has no argument {strange[0]!r}. {told} Arguments of all configs that name one are joined."
        )
    return kind(**(arguments or {}))
