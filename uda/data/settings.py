"""Label-set settings: what a class split makes of a task, and splits by counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uda.data.class_splits import published
from uda.data.classes import ClassSplit
from uda.data.samplers import permutation
from uda.errors import UDAError, nearest
from uda.metrics.names import LABEL_SETTINGS

_KEYS = ("known", "source_private", "target_private", "seed")


@dataclass(frozen=True)
class ClassCounts:
    """Classes by number: the first ones are known, the next ones source-private, then target-private; others drop out.

    Args:
        known, source_private, target_private: numbers of classes.
        seed: of the order in which classes are taken; None: that of their names (by number where all are numbers).
    """

    known: int
    source_private: int = 0
    target_private: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        for key in _KEYS:
            value = getattr(self, key)
            if value is None and key == "seed":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (key == "known"):
                least = 1 if key == "known" else 0
                raise UDAError(f"classes.{key} must be a whole number of at least {least}, not {value!r}")

    def of(self, names: Sequence[str]) -> ClassSplit:
        """The split of classes with these names, in natural order.

        Raises:
            UDAError: there are fewer.
        """
        wanted = self.known + self.source_private + self.target_private
        if wanted > len(names):
            raise UDAError(f"classes asks for {wanted} classes in all, but there are only {len(names)}")
        order = list(names)
        if self.seed is not None:
            order = [names[i] for i in permutation(len(names), self.seed, "classes", "split")]
        a, b = self.known, self.known + self.source_private
        return ClassSplit(order[:a], order[a:b], order[b:wanted])


def as_split(classes: ClassSplit | ClassCounts | dict | str | None) -> ClassSplit | ClassCounts | None:
    """A class split from a mapping of its fields (names or counts), or from the name of a published one.

    Raises:
        UDAError: other keys, names mixed with numbers, or no such published split.
    """
    if isinstance(classes, str):
        return published(classes)
    if classes is None or isinstance(classes, ClassSplit | ClassCounts):
        return classes
    if not isinstance(classes, Mapping) or set(classes) - set(_KEYS) or classes.get("known") is None:
        shown = sorted(map(str, classes)) if isinstance(classes, Mapping) else repr(classes)
        raise UDAError(
            "data.classes takes known, source_private and target_private (known is needed): names, or numbers of "
            f"classes with a seed; or it is the name of a published split. Not {shown}"
        )
    given: dict[str, Any] = {k: v for k, v in classes.items() if v is not None}
    numbers = [k for k in _KEYS[:3] if isinstance(given.get(k), int)]
    if numbers:
        if names := [k for k in _KEYS[:3] if k in given and k not in numbers]:
            raise UDAError(f"data.classes: {numbers[0]} is a number but {names[0]} is not: give names or numbers")
        return ClassCounts(**given)
    if "seed" in given:
        raise UDAError("data.classes: a seed goes with numbers of classes, not with names")
    return ClassSplit(**given)


def setting_of(source_private: bool, target_private: bool) -> str:
    """The narrowest setting of a task whose source or target has classes of its own."""
    return ("universal" if target_private else "partial") if source_private else "open" if target_private else "closed"


def check_setting(setting: str | None, source_private: Sequence[str], target_private: Sequence[str]) -> str:
    """The setting of a task: the one that was asked for, or the narrowest.

    Raises:
        UDAError: the classes do not fit it.
    """
    found = setting_of(bool(source_private), bool(target_private))
    if setting is None or setting in ("universal", found):
        return setting or found
    wrong = {
        "closed": "source and target have the same classes",
        "partial": "some classes are in the source only, and none in the target only",
        "open": "some classes are in the target only, and none in the source only",
    }[setting]
    told = [f"{len(n)} {what} ({', '.join(map(repr, n[:3]))}{', ...' if len(n) > 3 else ''})" for n, what in (
        (source_private, "source-private"), (target_private, "target-private")) if n]  # fmt: skip
    raise UDAError(
        f"data.setting is {setting!r}, where {wrong}; the classes of this task have "
        f"{' and '.join(told) or 'no private class'}: that is {found!r}"
    )


def check_name(setting: str | None) -> None:
    """Raise a :class:`~uda.errors.UDAError` on a setting that does not exist."""
    if setting is not None and setting not in LABEL_SETTINGS:
        raise UDAError(f"data.setting: unknown setting {setting!r}. {nearest(str(setting), LABEL_SETTINGS)}")
