"""Errors that a user can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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
