"""Objects that remember how they were made, so that a checkpoint can hold names and numbers, never pickles."""

from __future__ import annotations

import inspect
from typing import Any


class Described:
    """Mix-in: ``describe(obj)`` gives ``{"class_path": ..., "init_args": ...}`` for any instance.

    The arguments are taken in ``__new__``, so subclasses need no call to ``super().__init__`` for it.
    """

    def __new__(cls, *args: Any, **kwargs: Any):  # noqa: D102
        self = super().__new__(cls)
        try:
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
        except TypeError:  # copy and pickle call __new__ bare; a wrong call fails in __init__ with a better text
            return self
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name, {}))
        object.__setattr__(self, "_init_args", arguments)
        return self


_PLAIN = (str, int, float, bool, type(None))


def describe(value: Any) -> Any:
    """Plain form of a value: numbers and names as they are, described objects as ``class_path``/``init_args``.

    Raises:
        TypeError: for an object that cannot be described (an ``nn.Module`` built by hand, a function).
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return [describe(v) for v in value]
    if isinstance(value, dict):
        return {k: describe(v) for k, v in value.items()}
    if isinstance(value, Described) and "_init_args" in value.__dict__:
        cls = type(value)
        return {
            "class_path": f"{cls.__module__}.{cls.__qualname__}",
            "init_args": {k: describe(v) for k, v in value.__dict__["_init_args"].items()},
        }
    raise TypeError(f"{type(value).__name__} cannot be described by names and numbers")
