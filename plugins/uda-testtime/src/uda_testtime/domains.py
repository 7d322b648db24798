"""The shifts of a stream from a data module's reader."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from uda.data import Reader
from uda.data.batches import Request
from uda.errors import UDAError, nearest
from uda_testtime.corruptions import CORRUPTIONS, Corruptions
from uda_testtime.streams import GRADUAL, Shift


class Once(Reader):
    """Reads each domain once: several shifts share the sources. ``more``: names that its reader does not list."""

    def __init__(self, reader: Reader, more: list[str] | None = None) -> None:
        self.reader, self.found, self.more = reader, {}, list(more or [])

    def domains(self) -> list[str]:
        """Those of the reader, and more."""
        return [*self.reader.domains(), *self.more]

    def read(self, domain: str) -> Any:
        """The domain, at the first time from the reader."""
        if domain not in self.found:
            self.found[domain] = self.reader.read(domain)
        return self.found[domain]


def shifts_of(
    datamodule: Any, names: list[str] | None = None, corruptions: list[str] | None = None, severity: int = 5,
    cache: str | None = None, gradual: bool = False,
) -> list[Shift]:  # fmt: skip
    """Domains in the test view, each as the target of the data module.

    Args:
        datamodule: its reader, sources, classes and views count; names: of the domains; None: its target.
        corruptions: names of corruptions of each domain; ``["all"]``: the 15; None: none.
        severity, cache: of the corruptions; gradual: at the severities of ``GRADUAL`` in place of ``severity``.

    Raises:
        UDAError: unknown domains or corruptions, or other classes.
    """
    names, clean = list(names or [datamodule.target_name]), datamodule.reader.domains()
    if strange := [n for n in names if n not in clean]:
        raise UDAError(f"unknown domain {strange[0]!r} of the stream. {nearest(strange[0], clean)}")
    reader = Once(datamodule.reader)
    if gradual and not corruptions:
        raise UDAError("a gradual stream goes through severities: it needs corruptions.")
    if corruptions:
        found = list(CORRUPTIONS) if corruptions == ["all"] else corruptions
        if strange := [c for c in found if c not in CORRUPTIONS]:
            raise UDAError(f"unknown corruption {strange[0]!r}. {nearest(strange[0], CORRUPTIONS)}")
        levels = [f"/{s}" for s in GRADUAL] if gradual else [""]
        names = [f"{n}/{c}{level}" for n in names for c in found for level in levels]
        reader = Once(Corruptions(reader, severity, cache=cache), names if gradual else None)
    first, out = None, []
    for name in names:
        shift = _shift(datamodule, reader, name)
        classes = shift[1]
        first = first or classes
        if classes != first:
            raise UDAError(f"shift {name!r} has classes {classes[:5]}..., the first shift {first[:5]}...")
        out.append(shift[0])
    return out


def with_target(datamodule: Any, name: str, reader: Reader | None = None) -> Any:
    """The data module with another target, and with another reader if one is given; the given one is left alone."""
    part = copy.copy(datamodule)
    part.reader, part.target_name, part._task, part._shapes = reader or datamodule.reader, name, None, None
    part.trainer = None
    return part


def _shift(datamodule: Any, reader: Reader, name: str) -> tuple[Shift, list[str]]:
    part = with_target(datamodule, name, reader)
    pools = part.task.target
    dataset = part._feeds.dataset(pools, pools.eval, {"x": "test"}, replace_index=False)

    def fetch(rows: Tensor) -> Tensor:
        return dataset[Request(rows.numpy(), 0)]["x"]

    y = pools.eval.labels.numpy().copy()
    y[y >= part.num_classes] = -1  # classes that the model does not have
    datamodule.views = part.views
    return Shift(name, fetch, None if (y < 0).all() else y, len(pools.eval), part.ids(name)), part.class_names
