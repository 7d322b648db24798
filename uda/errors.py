"""Errors that a user can act on."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UDAError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A ``Did you mean ...?`` sentence, or the list of what is known when nothing is near."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"Known: {', '.join(known)}." if known else "None is known."


def check_choice(owner: str, option: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse a value of an option that is none of its choices.

    Args:
        owner: whose option it is, such as the plugin's name; option: its name.

    Raises:
        UDAError: with the choice that is near, or all of them.
    """
    choices = tuple(choices)
    if value not in choices:
        raise UDAError(f"{owner}: unknown {option} {value!r}. {nearest(str(value), choices)}")


def check_writable(option: str, folder: Path) -> None:
    """Refuse a folder to write in that cannot be one, before any work.

    Args:
        option: what named it; folder: it need not exist yet.

    Raises:
        UDAError: a file stands in its place or above it, or there is no permission to write.
    """
    folder = folder.absolute()
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))  # not raising, unlike p.exists
    if not there.is_dir():
        raise UDAError(f"{option} {folder}: {there} is a file, not a folder. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UDAError(f"{option} {folder}: no permission to write in {there}. Name another folder.")
