"""``uda adapt``: a model walks a stream once, adapts to each batch, and can stop and go on."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uda.errors import UDAError, check_writable

if TYPE_CHECKING:
    from uda_testtime.walk import Walk

_SHOWN = 20  # progress lines of a walk


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; others are settings of the data and the model, as in ``uda fit``."""
    out = argparse.ArgumentParser(
        "uda adapt", allow_abbrev=False,
        description="Walk a stream once: predict each batch, adapt to it, write predictions and running figures.",
        epilog="--config FILE (also of the plugin TestTime, whose `stream` may hold options), --model.init_from=CKPT "
        "and further settings as in `uda fit`. Labels are read for the figures named oracle, and to order correlated "
        "streams.",
    )  # fmt: skip
    out.add_argument("--setting", default="stored", help=(
        "stored (the target's own order, as `uda test` walks it), reset, continual, gradual, mixed, correlated, "
        "mixed_correlated (stored)"))  # fmt: skip
    out.add_argument("--shifts", nargs="+", metavar="DOMAIN", help="domains of the stream, in order (the target)")
    out.add_argument("--corruptions", nargs="+", metavar="NAME", help="corrupt the target; `all`: 15 (none)")
    out.add_argument("--severity", type=int, default=5, help="of corruptions, 1 to 5 (5); gradual: all")
    out.add_argument("--cache", metavar="DIR", help="folder for corrupted images")
    out.add_argument("--batch_size", type=int, default=64, help="samples a batch, from 1 (64)")
    out.add_argument("--order_seed", type=int, default=0, help="of the order (0)")
    out.add_argument("--delta", type=float, default=0.0, help="correlated streams: of the Dirichlet; 0: sorted (0)")
    out.add_argument("--limit", type=int, help="at most so many samples of each shift")
    out.add_argument("--autocast", choices=("bfloat16", "float16"), help="mixed precision; float16 is refused")
    out.add_argument("--prepared", metavar="FILE", help="of a method that was made ready; written if it does not exist")
    out.add_argument("-o", "--output", type=Path, help="folder (adapt/<method>-<setting> in the checkpoint's run)")
    out.add_argument("--resume", action="store_true", help="go on from the state in the output folder")
    out.add_argument("--stop_after", type=int, metavar="N", help="stop after so many batches; go on with --resume")
    out.add_argument("--save_every", type=int, default=50, metavar="N", help="batches between two states (50)")
    return out


def main(argv: list[str]) -> int:
    """``uda adapt --config FILE --model.init_from=CKPT [options]``.

    Returns:
        0; 75 when it stopped before the end.
    """
    args, rest = parser().parse_known_args(argv[1:])
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UDAError("uda adapt walks a stream in one process: batches come one after the other.")
    if not rest:
        raise UDAError("uda adapt needs a config and a checkpoint: --config FILE --model.init_from=CKPT")
    import torch

    from uda.commands.inspect import built
    from uda.run.directory import check_exists, is_used, run_of_checkpoint

    model, datamodule = built(rest, None, "adapt")
    if not (path := model.init_from):
        raise UDAError("uda adapt needs the source model: --model.init_from=CKPT")
    check_exists(path)
    plugin = _plugin(model)
    args, _ = parser().parse_known_args([*_words(plugin.stream), *argv[1:]])
    name = type(plugin.method).__name__
    out = args.output or run_of_checkpoint(path) / "adapt" / f"{name}-{args.setting}"
    state, ready = out / "state.pt", Path(args.prepared or out / "ready.pt")
    if args.resume and not state.is_file():
        raise UDAError(f"--resume: there is no {state}.")
    check_writable("--output", out)
    if not args.resume and is_used(out):
        raise UDAError(f"--output {out}: it is used. Name another folder, or go on with --resume.")
    stream = _stream(args, datamodule)
    adapter = _adapter(model, datamodule, plugin, path, str(ready) if ready.is_file() else plugin.prepared)
    from uda_testtime.walk import Walk

    walk = Walk(adapter, stream, getattr(torch, args.autocast) if args.autocast else None)
    if args.resume:
        walk.load(state)
    out.mkdir(parents=True, exist_ok=True)
    if plugin.method.needs != "nothing" and not ready.is_file():
        adapter.save_prepared(ready)
    _walk(walk, state, args)
    _write(walk, out, {"method": name, "scored": plugin.method.scored, "checkpoint": str(path), **{
        k: getattr(args, k) for k in ("setting", "batch_size", "order_seed", "delta", "limit")}})  # fmt: skip
    if walk.finished:
        return 0
    print(f"stopped after {walk.done} of {len(stream)} batches; go on: the same command with --resume --output {out}")
    return 75


def _words(stream: dict[str, Any]) -> list[str]:
    """A config's ``stream`` as options, before those of the command line, which win."""
    words = []
    for name, value in stream.items():
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _plugin(model: Any) -> Any:
    from uda_testtime.plugin import TestTime

    found = [p for p in model.plugins.values() if isinstance(p, TestTime)]
    if len(found) != 1:
        raise UDAError(
            f"uda adapt needs one plugin TestTime, this config has {len(found)}: --config configs/methods/tent.yaml"
        )
    return found[0]


def _adapter(model: Any, datamodule: Any, plugin: Any, path: str, prepared: str | None) -> Any:
    from uda import checkpointing, checks
    from uda.commands.inspect import device
    from uda_testtime.plugin import adapter_of

    checks.take_spec(model, datamodule)
    model.configure_model()
    checkpointing.init_from(model, path)
    return adapter_of(model.to(device()).eval(), plugin.method, datamodule, prepared=prepared, **plugin.options())


def _stream(args: argparse.Namespace, datamodule: Any) -> Any:
    from uda_testtime.domains import shifts_of
    from uda_testtime.streams import Stream

    shifts = shifts_of(
        datamodule, args.shifts, args.corruptions, args.severity, args.cache, gradual=args.setting == "gradual"
    )
    return Stream(shifts, args.setting, args.batch_size, args.order_seed, args.delta, args.limit)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that ask for an end; they are acted on between two batches."""
    asked: list[int] = []
    old = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _walk(walk: Walk, state: Path, args: argparse.Namespace) -> None:
    total, every = len(walk.stream), max(1, args.save_every)
    last = total if args.stop_after is None else min(total, walk.done + args.stop_after)
    with _signals() as asked:
        while walk.done < last and not asked:
            walk.step()
            if walk.done % every == 0:
                walk.save(state)
            if walk.done % max(1, total // _SHOWN) == 0:
                known = sum(r["oracle_known"] for r in walk.logs)
                told = _told(100 * sum(r["oracle_errors"] for r in walk.logs) / known if known else None)
                print(f"batch {walk.done}/{total}, {walk.logs[-1]['shift']}{told}", file=sys.stderr, flush=True)
    walk.save(state)


def _told(error: float | None) -> str:
    return "" if error is None else f", online error {error:.2f} % (oracle)"


def _write(walk: Walk, out: Path, told: dict[str, Any]) -> None:
    """``predictions.csv``, ``batches.csv`` and ``stream.json``, of what was walked so far."""
    with (out / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["position", "shift", "index", "id", "label", "score"])
        for i, (s, row) in enumerate(walk.stream.rows.tolist()):
            if walk.labels[i] >= 0:
                shift = walk.stream.shifts[s]
                name = shift.ids[row] if shift.ids else row
                writer.writerow([i, shift.name, row, name, int(walk.labels[i]), f"{walk.scores[i]:.6f}"])
    errors = known = 0
    with (out / "batches.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*(walk.logs[0] if walk.logs else ()), "oracle_online_error"])
        for row in walk.logs:
            errors, known = errors + row["oracle_errors"], known + row["oracle_known"]
            writer.writerow([*row.values(), f"{errors / known:.6f}" if known else ""])
    figures = walk.figures()
    (out / "stream.json").write_text(json.dumps({**told, "finished": walk.finished, **figures}, indent=2) + "\n")
    print(f"{figures['samples']} predictions{_told(figures['oracle_error'])}: {out}")
