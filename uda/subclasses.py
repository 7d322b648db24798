"""Names of subclasses, as jsonargparse looks for them in a config, without the same search again and again."""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from typing import Any

#: by class: how many modules were loaded when its path was looked for, and the path
_PATHS: weakref.WeakKeyDictionary[type, tuple[int, str]] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def subclasses_listed_once() -> Iterator[None]:
    """While it is open, jsonargparse lists the subclasses of a class once, and again after a further import.

    The import path of each of them is kept for later parsers of the process as well.

    It takes text that stands where a class may (``backbone: small_cnn``) for a short class name first, and walks over
    all of torch's modules at each check of the value: 16 times in ``uda fit``, a third of the time until the data are
    read.
    """
    hints = sys.modules.get("jsonargparse._typehints")
    listed, path_of = (getattr(hints, n, None) for n in ("get_all_subclass_paths", "get_import_path"))
    if listed is None or path_of is None:  # they are private: a version without them takes its time
        yield
        return
    known: dict[Any, list[str]] = {}

    def path(value: Any) -> Any:
        if type(value) is not type:  # a class whose own class may compare it in its own way, or no class
            return path_of(value)
        loaded, found = _PATHS.get(value, (0, None))
        if loaded != len(sys.modules):
            found = path_of(value)
            _PATHS[value] = len(sys.modules), found
        return found

    def once(cls: Any, *args: Any, **options: Any) -> list[str]:
        key = (cls, args, *sorted(options.items()), len(sys.modules))
        if key not in known:
            known[key] = listed(cls, *args, **options)
        return known[key]

    hints.get_all_subclass_paths, hints.get_import_path = once, path
    try:
        yield
    finally:
        hints.get_all_subclass_paths, hints.get_import_path = listed, path_of
