"""Checks of the data module's settings, all made before the first step."""

from __future__ import annotations

from typing import Any

from uda.data.pools import Task
from uda.data.readers import Reader
from uda.errors import UDAError, nearest


def check_settings(
    batch_sizes: dict[str, int | None],
    fractions: dict[str, float],
    choices: dict[str, tuple[str, tuple[str, ...]]],
) -> None:
    """Ranges of the plain settings; named in the message."""
    for name, value in batch_sizes.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UDAError(f"data.{name} must be a whole number of at least 1, not {value!r}")
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise UDAError(f"data.{name} must be at least 0 and below 1, not {value!r}")
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise UDAError(
                f"data.{name} is {value!r}; it must be one of {', '.join(allowed)}. {nearest(value, allowed)}"
            )


def check_domains(reader: Reader, sources: list[str], target: str) -> None:
    """The names of the domains: known, each once, source and target apart."""
    known = reader.domains()
    where = type(reader).__name__
    for role, name in [*(("source", s) for s in sources), ("target", target)]:
        if name not in known:
            place = f" ({told})" if (told := reader.place(name)) else ""
            raise UDAError(f"unknown {role} domain {name!r} in {where}{place}. {nearest(name, known)}")
    if target in sources:
        raise UDAError(f"domain {target!r} is both source and target; choose two different domains")
    if len(set(sources)) < len(sources):
        raise UDAError(f"a source domain is named twice: {sources}")


def check_batches(task: Task, source_batch: int, target_batch: int, world: int, needs: Any) -> None:
    """No training batch over all ranks may be larger than the pool that it is drawn from."""
    for pools in task.all():
        if not (needs.target if pools.is_target else needs.source):
            continue
        batch = (target_batch if pools.is_target else source_batch) * world
        if batch > len(pools.train):
            key = "target_batch_size" if pools.is_target else "batch_size"
            over = f" over {world} processes" if world > 1 else ""
            raise UDAError(
                f"data.{key} makes batches of {batch}{over}, but domain {pools.name!r} has only "
                f"{len(pools.train)} training images; set it to at most {max(1, len(pools.train) // world)}"
            )


def check_shapes(shapes: dict[str, tuple[int, ...]], heterogeneous: bool) -> None:
    """All domains must give inputs of one shape, unless the task is heterogeneous."""
    if len(set(shapes.values())) > 1 and not heterogeneous:
        listed = ", ".join(f"{name}: {list(shape)}" for name, shape in shapes.items())
        raise UDAError(
            f"domains give inputs of different shapes ({listed}); make them equal with `views` "
            "(size, channels), or set heterogeneous: true for a model with one stem per domain"
        )
