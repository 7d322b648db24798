"""The label space: which class names are known, and the ids they have in every domain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uda.data.domains import DomainData
from uda.data.multilabel import columns
from uda.data.readers import natural_order
from uda.errors import UDAError, nearest


@dataclass(frozen=True)
class ClassSplit:
    """Class names by where they occur: partial, open-set and universal adaptation are choices of these.

    Args:
        known: in source and target.
        source_private: in the source only; they have ids of their own.
        target_private: in the target only; in evaluation all of them are one id, the number of classes.
    """

    known: list[str]
    source_private: list[str] = field(default_factory=list)
    target_private: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("known", "source_private", "target_private"):
            object.__setattr__(self, key, _names(key, getattr(self, key)))
        if not self.known:
            raise UDAError("classes.known is empty: source and target must share at least one class")
        seen: dict[str, str] = {}
        for key in ("known", "source_private", "target_private"):
            for name in getattr(self, key):
                if name in seen:
                    both = {key, seen[name]} == {"source_private", "target_private"}
                    why = ": a source-private class has no sample in the target" if both else ""
                    raise UDAError(f"class {name!r} is in classes.{seen[name]} and again in classes.{key}{why}")
                seen[name] = key


def _names(key: str, given: object) -> list[str]:
    """A list of names as text; one bare name is a list of it."""
    given = [] if given is None else [given] if isinstance(given, str) else given
    plain_items = isinstance(given, Sequence) and all(isinstance(n, str | int | float) for n in given)
    if not plain_items:
        raise UDAError(f"classes.{key} must be a list of class names, or a whole number of classes, not {given!r}")
    return [str(n) for n in given]  # YAML reads a bare 3 as a number


@dataclass(frozen=True)
class LabelSpace:
    """Names of the C source classes in id order, and the names that count as unknown.

    With ``split``, only rows of these classes belong to the pools. ``source_private`` are those of the class names that
    the target lacks.
    """

    class_names: list[str]
    unknown: tuple[str, ...] = ()
    split: bool = False
    source_private: tuple[str, ...] = ()
    multi_label: bool = False

    def ids(self, data: DomainData) -> np.ndarray:
        """Class id of each row, int64 [N]: C + j is the j-th unknown class, -1 no label or no part in the task.

        Multi-label: 0 or 1 for each class, float32 [N, C], -1 without labels.
        """
        if self.multi_label:
            return columns(data, self.class_names)
        if data.labels is None:
            return np.full(len(data), -1, dtype=np.int64)
        position = {name: i for i, name in enumerate(self.class_names)}
        position |= {name: len(self.class_names) + j for j, name in enumerate(self.unknown)}
        table = np.array([position.get(name, -1) for name in data.class_names], dtype=np.int64)
        return table[data.labels.numpy()]

    def source_rows(self, data: DomainData) -> np.ndarray:
        """Rows of a source that may be trained on: those of a known or source-private class."""
        if self.multi_label:
            return np.arange(len(data))
        ids = self.ids(data)
        return np.flatnonzero((ids >= 0) & (ids < len(self.class_names)))

    def target_rows(self, data: DomainData) -> np.ndarray:
        """Rows of the target: all; with a split those of a known or target-private class."""
        if not self.split or data.labels is None or self.multi_label:
            return np.arange(len(data))
        allowed = (set(self.class_names) - set(self.source_private)) | set(self.unknown)
        table = np.array([name in allowed for name in data.class_names], dtype=bool)
        return np.flatnonzero(table[data.labels.numpy()])


def label_space(
    sources: list[DomainData],
    target: DomainData,
    split: ClassSplit | None,
    allow_missing: bool = False,
    setting: str | None = None,
) -> LabelSpace:
    """The label space of a task, after checking it against the domains.

    Where no split is given, an open ``setting`` (any but ``closed``) takes the classes as they occur: those that the
    target lacks are source-private, those that no source has are unknown. Ids are those of the sources' classes alone.

    Raises:
        UDAError: a source without labels; a class that a domain lacks; a class name that no domain has.
    """
    for data in sources:
        if data.labels is None:
            raise UDAError(f"source domain {data.name!r} has no labels; only the target may be unlabelled")
    if split is not None:
        _check_split(sources, target, split, allow_missing)
        names = split.known + split.source_private
        return LabelSpace(names, tuple(split.target_private), True, tuple(split.source_private))
    labelled = [d for d in [*sources, target] if d.labels is not None]
    if not labelled:
        raise UDAError(
            f"no class is known: target {target.name!r} has no labels and there is no source; "
            "give data.classes: {known: [...]}, the classes of the source's model in its order"
        )
    if sources and setting not in (None, "closed"):
        return _as_they_occur(sources, target)
    names = natural_order(n for d in labelled for n in d.class_names)
    if sources:
        in_sources = {n for d in sources for n in _present(d)}
        stray = [n for n in names if n not in in_sources and n in _present(target)]
        if stray:
            raise UDAError(
                f"class {stray[0]!r}{_others(stray)} is in target {target.name!r} but missing in source "
                f"{', '.join(repr(d.name) for d in sources)}; "
                "list such classes in classes.target_private, set data.setting, or remove them"
            )
        names = [n for n in names if n in in_sources or n in {m for d in sources for m in d.class_names}]
    if not allow_missing:
        for data in labelled:
            missing = [n for n in names if n not in _present(data)]
            if missing:
                raise UDAError(
                    f"class {missing[0]!r} is missing in domain {data.name!r}{_others(missing)}; "
                    "describe the task with `classes` or `setting`, or set allow_missing_classes: true"
                )
    return LabelSpace(names)


def _as_they_occur(sources: list[DomainData], target: DomainData) -> LabelSpace:
    names = natural_order(n for d in sources for n in _present(d))
    in_target = _present(target)
    private = [n for n in names if n not in in_target] if target.labels is not None else []
    if in_target and len(private) == len(names):
        raise UDAError(f"no class of target {target.name!r} is in a source: they must share at least one")
    return LabelSpace(names, tuple(natural_order(in_target - set(names))), False, tuple(private))


def _present(data: DomainData) -> set[str]:
    if data.labels is None:
        return set()
    return {data.class_names[i] for i in np.unique(data.labels.numpy())}


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def spelled(split: ClassSplit, names: Sequence[str]) -> ClassSplit:
    """The split with class names as the data spells them: case, blanks, hyphens and underscores may differ."""
    have, found = set(names), {plain(n): n for n in names}
    fields = ("known", "source_private", "target_private")
    return ClassSplit(*([n if n in have else found.get(plain(n), n) for n in getattr(split, f)] for f in fields))


def plain(name: str) -> str:
    """Names as people spell folders: ``Real World``, ``RealWorld`` and ``real_world`` are one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _check_split(
    sources: list[DomainData], target: DomainData, split: ClassSplit, allow_missing: bool
) -> None:
    in_sources = {n for d in sources for n in _present(d)}
    in_target = _present(target)
    named = in_sources | {n for n in target.class_names if target.labels is not None}
    for key, wanted, present, where, asked in (
        ("known", split.known, in_sources, "any source", bool(sources)),
        ("source_private", split.source_private, in_sources, "any source", bool(sources)),
        ("known", split.known, in_target, f"target {target.name!r}", target.labels is not None),
        ("target_private", split.target_private, in_target, f"target {target.name!r}", target.labels is not None),
    ):
        for name in wanted if asked else ():
            if name not in present and not (allow_missing and name in named):
                raise UDAError(f"classes.{key} names {name!r}, which is not in {where}. {_help(key, name, present)}")


def _help(key: str, name: str, present: set[str]) -> str:
    if name.isdecimal() and not any(n.isdecimal() for n in present):
        return f"Classes are named here ({', '.join(sorted(present)[:3])}, ...); for a number of them give {key}: 3."
    return nearest(name, present)
