"""Runs that start from the checkpoints of other methods' runs of the same task and seed.

A method's ``init_from`` names them: one method, whose checkpoint is ``model.init_from``, or settings with the method or
the list of methods whose checkpoints they take. The named runs are made first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uda.errors import UDAError, check_choice, nearest

if TYPE_CHECKING:
    from uda.bench.suite import Run

SETTING = "model.init_from"
CHECKPOINTS = ("last", "selected")


@dataclass(frozen=True)
class Start:
    """A setting of a run that takes checkpoints of runs before it.

    Attributes:
        setting: dotted key.
        firsts: the runs.
        checkpoint: which one of theirs, ``last`` or ``selected``.
        many: the setting takes a list, also of one.
    """

    setting: str
    firsts: tuple[Run, ...]
    checkpoint: str = "last"
    many: bool = False

    def identity(self) -> list[str]:
        """What the key of the run that starts here has of it: another first run makes another run of it."""
        return [self.checkpoint, *(run.key for run in self.firsts)]

    def value(self, used: dict[str, str]) -> str | list[str]:
        """Files for the setting; ``used`` takes ``file -> method/key/checkpoint``, for records without folders."""
        files = []
        for run in self.firsts:
            files.append(str(checkpoint_of(run, self.checkpoint).absolute()))
            used[files[-1]] = f"{run.method}/{run.key}/{self.checkpoint}.ckpt"
        return files if self.many else files[0]


def checkpoint_of(run: Run, name: str) -> Path:
    """The file of a run's checkpoint."""
    return run.folder / "checkpoints" / f"{name}.ckpt"


def has_left(run: Run, checkpoints: Iterable[str]) -> bool:
    """Whether a run has ended (and so has its last state on disk) and left all these checkpoints."""
    files = [checkpoint_of(run, name) for name in checkpoints]
    return not files or ((run.folder / "summary.json").is_file() and all(f.is_file() for f in files))


# ---------------------------------------------------------------------------------------------- of a suite


def settings_of(spec: Mapping[str, Any], where: str) -> dict[str, str | list[str]]:
    """A method's ``init_from`` as settings with the names of methods.

    Raises:
        UDAError: something else than names.
    """
    given = spec.get("init_from")
    if given is None:
        if "checkpoint" in spec:
            raise UDAError(f"{where}: checkpoint says what init_from takes, and there is no init_from.")
        return {}
    check_choice(where, "checkpoint", spec.get("checkpoint", "last"), CHECKPOINTS)
    out = {SETTING: given} if isinstance(given, str) else given
    if not isinstance(out, Mapping) or not all(_are_names(v) for v in out.values()):
        raise UDAError(
            f"{where}.init_from: name a method of the suite, or {{SETTING: METHOD or list of methods}}, not {given!r}."
        )
    return {str(k): v for k, v in out.items()}


def _are_names(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str)


def listed(names: str | list[str]) -> list[str]:
    """One name or several, as a list."""
    return [names] if isinstance(names, str) else names


def in_order(methods: Mapping[str, Mapping[str, Any]], where: str) -> list[str]:
    """Names of methods as they stand, but each after those that it starts from.

    Raises:
        UDAError: ``init_from`` names no method of the suite, or methods wait for each other.
    """
    out: list[str] = []

    def place(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            circle = " -> ".join((*path[path.index(name) :], name))
            raise UDAError(f"{where}: init_from goes in a circle: {circle}.")
        if name in out:
            return
        for first in (n for v in settings_of(methods[name], f"{where}: methods.{name}").values() for n in listed(v)):
            if first not in methods:
                raise UDAError(
                    f"{where}: methods.{name}.init_from: no method {first!r} in the suite. {nearest(first, methods)}"
                )
            place(first, (*path, name))
        out.append(name)

    for name in methods:
        place(name, ())
    return out


# ------------------------------------------------------------------------------------------------ of runs


def with_firsts(runs: Sequence[Run]) -> list[Run]:
    """Runs, each after all that it starts from; those that were not among them are added."""
    out: dict[str, Run] = {}

    def place(run: Run) -> None:
        for first in (f for start in run.starts for f in start.firsts):
            place(first)
        out.setdefault(run.label, run)

    for run in runs:
        place(run)
    return list(out.values())


def wanted(runs: Sequence[Run], finished: Collection[str]) -> dict[str, set[str]]:
    """Checkpoints that runs which are still to be made start from, by the key of the run that leaves them.

    Args:
        runs: of :func:`with_firsts`.
        finished: keys of finished runs. One of which a wanted checkpoint is gone is to be made again.
    """
    out: dict[str, set[str]] = {}
    for run in reversed(runs):
        if run.key in finished and has_left(run, out.get(run.key, ())):
            continue
        for start in run.starts:
            for first in start.firsts:
                out.setdefault(first.key, set()).add(start.checkpoint)
    return out


def missing(runs: Sequence[Run], finished: Collection[str]) -> list[Run]:
    """Those of :func:`with_firsts` that are to be made: not finished, or a checkpoint that is wanted is gone."""
    needed = wanted(runs, finished)
    return [r for r in runs if r.key not in finished or not has_left(r, needed.get(r.key, ()))]


def waits_for(run: Run, finished: Collection[str], planned: Collection[str] = ()) -> tuple[Run, str] | None:
    """The first of the runs that this one starts from which is not there yet, and the checkpoint of it.

    Args:
        finished: keys of finished runs; planned: of those that are still to be made, perhaps anew: their folders go.
    """
    for start in run.starts:
        for first in start.firsts:
            if first.key in planned or first.key not in finished or not has_left(first, [start.checkpoint]):
                return first, start.checkpoint
    return None


def why_skipped(first: Run, checkpoint: str, finished: Collection[str]) -> str:
    """Why a run that starts from ``first`` cannot be made."""
    what = f"left no {checkpoint}.ckpt in {first.folder}" if first.key in finished else "did not finish"
    return f"it starts from {first.label}, which {what}"


def replaced(run: Run, **changes: Any) -> Run:
    """A run with fields changed, and all that it starts from in the same way."""
    starts = tuple(
        dataclasses.replace(s, firsts=tuple(replaced(f, **changes) for f in s.firsts)) for s in run.starts
    )
    return dataclasses.replace(run, starts=starts, **changes)
