"""The label space: which class names are known, and the ids they have in every domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uda.data.domains import DomainData
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
        # YAML reads a bare 3 as a number; class names are text.
        for key in ("known", "source_private", "target_private"):
            object.__setattr__(self, key, [str(n) for n in getattr(self, key) or []])
        if not self.known:
            raise UDAError("classes.known is empty: source and target must share at least one class")
        seen: dict[str, str] = {}
        for key in ("known", "source_private", "target_private"):
            for name in getattr(self, key):
                if name in seen:
                    raise UDAError(f"class {name!r} is in classes.{seen[name]} and again in classes.{key}")
                seen[name] = key


def as_split(classes: ClassSplit | dict | None) -> ClassSplit | None:
    """A class split from a mapping of its fields."""
    if classes is None or isinstance(classes, ClassSplit):
        return classes
    unknown = set(classes) - {"known", "source_private", "target_private"}
    if unknown or "known" not in classes:
        raise UDAError(
            f"data.classes takes known, source_private and target_private (known is needed), "
            f"not {sorted(classes)}"
        )
    return ClassSplit(**classes)


@dataclass(frozen=True)
class LabelSpace:
    """Known class names in id order, and the names that count as unknown.

    ``keep`` is None in the closed set; else only rows of these classes belong to the pools.
    """

    class_names: list[str]
    unknown: frozenset[str] = frozenset()
    split: bool = False

    def ids(self, data: DomainData) -> np.ndarray:
        """Class id of each row, int64 [N]: C is unknown, -1 a class outside the split or no label."""
        if data.labels is None:
            return np.full(len(data), -1, dtype=np.int64)
        position = {name: i for i, name in enumerate(self.class_names)}
        position.update(dict.fromkeys(self.unknown, len(self.class_names)))
        table = np.array([position.get(name, -1) for name in data.class_names], dtype=np.int64)
        return table[data.labels.numpy()]

    def source_rows(self, data: DomainData) -> np.ndarray:
        """Rows of a source that may be trained on: those of a known or source-private class."""
        ids = self.ids(data)
        return np.flatnonzero((ids >= 0) & (ids < len(self.class_names)))

    def target_rows(self, data: DomainData, source_private: Sequence[str] = ()) -> np.ndarray:
        """Rows of the target: all; with a split those of a known or target-private class."""
        if not self.split or data.labels is None:
            return np.arange(len(data))
        allowed = (set(self.class_names) - set(source_private)) | self.unknown
        table = np.array([name in allowed for name in data.class_names], dtype=bool)
        return np.flatnonzero(table[data.labels.numpy()])


def label_space(
    sources: list[DomainData], target: DomainData, split: ClassSplit | None, allow_missing: bool = False
) -> LabelSpace:
    """The label space of a task, after checking it against the domains.

    Raises:
        UDAError: a source without labels; a class that a domain lacks; a class name that no domain has.
    """
    for data in sources:
        if data.labels is None:
            raise UDAError(f"source domain {data.name!r} has no labels; only the target may be unlabelled")
    if split is not None:
        _check_split(sources, target, split)
        return LabelSpace(split.known + split.source_private, frozenset(split.target_private), split=True)
    labelled = [d for d in [*sources, target] if d.labels is not None]
    if not labelled:
        raise UDAError(
            f"no class is known: target {target.name!r} has no labels and there is no source; "
            "give classes.known"
        )
    names = natural_order(n for d in labelled for n in d.class_names)
    if sources:
        in_sources = {n for d in sources for n in _present(d)}
        stray = [n for n in names if n not in in_sources and n in _present(target)]
        if stray:
            raise UDAError(
                f"class {stray[0]!r}{_others(stray)} is in target {target.name!r} but missing in source "
                f"{', '.join(repr(d.name) for d in sources)}; "
                "list such classes in classes.target_private, or remove them"
            )
        names = [n for n in names if n in in_sources or n in {m for d in sources for m in d.class_names}]
    if not allow_missing:
        for data in labelled:
            missing = [n for n in names if n not in _present(data)]
            if missing:
                raise UDAError(
                    f"class {missing[0]!r} is missing in domain {data.name!r}{_others(missing)}; "
                    "describe the task with `classes`, or set allow_missing_classes: true"
                )
    return LabelSpace(names)


def _present(data: DomainData) -> set[str]:
    if data.labels is None:
        return set()
    return {data.class_names[i] for i in np.unique(data.labels.numpy())}


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_split(sources: list[DomainData], target: DomainData, split: ClassSplit) -> None:
    in_sources = {n for d in sources for n in _present(d)}
    in_target = _present(target)
    labelled_target = target.labels is not None
    for key, wanted, present, where in (
        ("known", split.known, in_sources, "any source"),
        ("source_private", split.source_private, in_sources, "any source"),
        ("known", split.known, in_target, f"target {target.name!r}"),
        ("target_private", split.target_private, in_target, f"target {target.name!r}"),
    ):
        if (present is in_sources and not sources) or (present is in_target and not labelled_target):
            continue
        for name in wanted:
            if name not in present:
                raise UDAError(
                    f"classes.{key} names {name!r}, which is not in {where}. "
                    f"{nearest(name, present | in_sources)}"
                )
