"""A testing kit for plugins: one line in a test checks what a run in earnest would find out late.

from uda.testing import check_plugin
from my_package import MyMethod

def test_my_method():
    check_plugin(MyMethod)
"""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from uda.plugin import Plugin
from uda.testing.bench import Bench, quiet
from uda.testing.distributed import check_together
from uda.testing.distributed import ddp as _ddp
from uda.testing.fitness import checkpoint, construction, lifecycle
from uda.testing.liveness import liveness as _liveness
from uda.testing.report import CheckFailed, PluginWarning, Report
from uda.testing.runs import accumulation, no_label_leak, precision, resume
from uda.testing.surroundings import global_state, kept_globals
from uda.testing.task import TinyTask

__all__ = ["CHECKS", "CheckFailed", "PluginWarning", "Report", "TinyTask", "check_plugin", "check_plugins_ddp"]

#: Checks by name, in the order in which they run.
CHECKS: dict[str, Callable[..., None]] = {
    "construction": construction,
    "lifecycle": lifecycle,
    "liveness": _liveness,
    "checkpoint": checkpoint,
    "global_state": global_state,
    "no_label_leak": no_label_leak,
    "resume": resume,
    "accumulation": accumulation,
    "precision": precision,
    "ddp": _ddp,
}


def check_plugin(
    cls: type[Plugin],
    *,
    init_args: dict[str, Any] | None = None,
    partners: dict[str, Any] | None = None,
    kind: Literal["features", "images"] = "features",
    sources: int = 1,
    ddp: bool = True,
    liveness: bool = True,
    skip: dict[str, str] | None = None,
    only: Iterable[str] | None = None,
    backbone: Callable[[], nn.Module] | None = None,
    model_args: dict[str, Any] | None = None,
    data_args: dict[str, Any] | None = None,
    precision_tolerance: float = 0.1,
    ddp_timeout: float = 180.0,
) -> Report:
    """Check a plugin on a generated task, in seconds (some more for ``ddp`` where processes cannot be forked).

    Args:
        cls: the plugin class.
        init_args: plain constructor arguments.
        partners: other plugins by key that the method needs beside it (objects, names or class_path dicts). A
            plugin that only weighs objectives or only gives pseudo-labels gets one by itself.
        kind: inputs of the task: rows of 6 numbers, or images 1x8x8.
        sources: number of source domains.
        ddp: train under two processes as well.
        liveness: require that the plugin has an effect.
        skip: checks to leave out, with the reason.
        only: names of the checks to run; None: all of :data:`CHECKS`.
        backbone: makes a fresh network of the same weights under the same random numbers, for a plugin that needs
            layers which the task's own lack (``liveness`` runs without BatchNorm): ``partial(SmallCNN, 1, (4, 8))``.
            With it samples may see each other in ``liveness``.
        model_args: further arguments of :class:`uda.UDA`, such as ``{"head": "cosine"}``.
        data_args: further arguments of :class:`uda.data.DataModule`, such as ``{"classes": {...}}``.
        precision_tolerance: how far an objective may be off in bfloat16, relative to one plus its size.
        ddp_timeout: seconds until the two processes are stopped.

    Returns:
        What was checked, skipped and warned of; ``print(report)`` shows it.

    Raises:
        CheckFailed: (an ``AssertionError``) at the first check that does not hold, with what to do.
    """
    reasons = dict(skip or {})
    if not ddp:
        reasons.setdefault("ddp", "ddp=False")
    if not liveness:
        reasons.setdefault("liveness", "liveness=False")
    chosen = list(CHECKS) if only is None else list(only)
    if unknown := (set(chosen) | set(reasons)) - set(CHECKS):
        raise ValueError(f"Unknown checks {sorted(unknown)}: there are {', '.join(CHECKS)}.")
    options = {
        "precision": functools.partial(precision, tolerance=precision_tolerance),
        "ddp": functools.partial(_ddp, timeout=ddp_timeout),
    }
    report = Report(cls.__name__)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet():
        bench = Bench(
            cls,
            dict(init_args or {}),
            dict(partners or {}),
            kind,
            sources,
            dict(model_args or {}),
            dict(data_args or {}),
            backbone,
            folder,
        )
        for name in [n for n in CHECKS if n in chosen]:
            if name in reasons:
                report.skipped[name] = reasons[name]
                continue
            start = time.perf_counter()
            with kept_globals():
                options.get(name, CHECKS[name])(bench, report)
            report.seconds[name] = time.perf_counter() - start
            report.passed.append(name)
    return report


def check_plugins_ddp(cases: Iterable[tuple[type[Plugin], Mapping[str, Any]]], timeout: float = 180.0) -> None:
    """The check ``ddp`` of several plugins in one pair of processes.

    Args:
        cases: plugin class, and those arguments of :func:`check_plugin` that make the task: ``init_args``,
            ``partners``, ``kind``, ``sources``, ``backbone``, ``model_args``, ``data_args``.
        timeout: seconds for the start and one case; 30 more for each further one.

    Raises:
        CheckFailed: (an ``AssertionError``) of the first plugin that fails, with what to do.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, quiet():
        benches = [Bench(cls, **{"folder": folder, **given}) for cls, given in cases]
        if benches:
            check_together(benches, timeout + 30.0 * (len(benches) - 1))
