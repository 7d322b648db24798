"""Checks that compare runs: resume, precision, accumulation and clipping, labels."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from uda.step import Step
from uda.testing.bench import BATCH, EPOCHS, KEY, STEPS, Bench, difference, state_of
from uda.testing.fitness import plain_attributes
from uda.testing.report import CheckFailed, Report
from uda.testing.undisturbed import record, undisturbed


def _not_saved(bench: Bench, model: Any) -> str:
    """Plain attributes that training changed and tensors that no checkpoint holds: suspects for a message."""
    plugin, fresh = model.plugins[KEY], bench.plugin()
    now, then = plain_attributes(plugin), plain_attributes(fresh)
    suspects = [k for k in now if k in then and now[k] != then[k]]
    kinds = (Tensor, list, dict, torch.Generator)
    suspects += [
        k for k, v in vars(plugin).items() if isinstance(v, kinds) and not k.startswith("_") and v is not None
    ]
    suspects += sorted(plugin._non_persistent_buffers_set)
    return f" Attributes that no checkpoint holds: {', '.join(suspects)}." if suspects else ""


def resume(bench: Bench, report: Report) -> None:
    """A run resumed from a checkpoint in mid-epoch equals the undisturbed run bit for bit."""
    whole, expected, _, checkpoints = undisturbed(bench)
    for batch, path in checkpoints.items():
        resumed = bench.built()
        try:
            bench.train(resumed, ckpt_path=path)
        except Exception as error:
            raise CheckFailed(
                bench.cls.__name__,
                "resume",
                f"resuming raised {type(error).__name__}: {error}",
                "keep the state in parameters and buffers of fixed size, or in "
                "get_extra_state/set_extra_state",
            ) from error
        if wrong := difference(state_of(resumed), expected):
            raise CheckFailed(
                bench.cls.__name__,
                "resume",
                f"resumed after batch {batch} the run ends with other values of {wrong[0]!r} and "
                f"{len(wrong) - 1} more "
                f"than the undisturbed run.{_not_saved(bench, whole)}",
                "keep counters, memories and teachers in buffers (register_buffer); take ramps from "
                "step.progress, and "
                "random numbers from torch's default generator, which is seeded for each step",
            )


def no_label_leak(bench: Bench, report: Report) -> None:
    """Permuted target labels change no trained weight, bit for bit."""
    model = bench.built()
    bench.train(model, permute=1)
    if wrong := difference(undisturbed(bench).state, state_of(model)):
        raise CheckFailed(
            bench.cls.__name__,
            "no_label_leak",
            f"other target labels gave other values of {wrong[0]!r} and {len(wrong) - 1} more",
            "train on what the step and the pools give; neither holds target labels, so the plugin must "
            "have taken them "
            "from the data module, the reader or the evaluation",
        )


def precision(bench: Bench, report: Report, tolerance: float = 0.1) -> None:
    """bf16-mixed runs, stays finite, and starts from float32's objectives."""
    full = undisturbed(bench).objectives
    try:
        half = record(bench, bench.built(), precision="bf16-mixed")
    except Exception as error:
        raise CheckFailed(
            bench.cls.__name__,
            "precision",
            f"bf16-mixed raised {type(error).__name__}: {error}",
            "compute in float32 what needs it: with torch.autocast(x.device.type, enabled=False) and "
            "x.float(); write "
            "buffers in their own dtype",
        ) from error
    for number, step in enumerate(half):
        for name, value in step.items():
            if not math.isfinite(value):
                raise CheckFailed(
                    bench.cls.__name__,
                    "precision",
                    f"{name!r} is {value} at step {number} in bf16-mixed",
                    "take logarithms, norms and exponentials in float32 with autocast off",
                )
    for name, value in full[0].items():
        if name in half[0] and abs(half[0][name] - value) > tolerance * (1 + abs(value)):
            raise CheckFailed(
                bench.cls.__name__,
                "precision",
                f"{name!r} is {half[0][name]:.4g} in bf16-mixed and {value:.4g} in float32 on the same batch",
                "distances, transport costs and logarithms need float32: switch autocast off around them",
            )


class _CountSteps(L.Callback):
    """Counts optimiser steps and keeps the largest gradient norm at a step."""

    def __init__(self) -> None:
        self.steps, self.norm = 0, 0.0

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(self._stepped)

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        if grads:
            self.norm = max(self.norm, float(torch.stack([g.norm() for g in grads]).norm()))


def accumulation(bench: Bench, report: Report) -> None:
    """Gradient accumulation and clipping work: fewer steps, and no step above the norm."""
    clip, every = 0.05, 2
    if bench.manual:
        model, options = bench.built(manual_accumulate=every, manual_clip=clip), {}
    else:
        model, options = bench.built(), {"accumulate_grad_batches": every, "gradient_clip_val": clip}
    counter = _CountSteps()
    try:
        bench.train(model, callbacks=[counter], limit_val_batches=0, **options)
    except Exception as error:
        raise CheckFailed(
            bench.cls.__name__,
            "accumulation",
            f"with accumulation it raised {type(error).__name__}: {error}",
            "after_step runs on each batch; step.updated tells whether the optimiser has stepped",
        ) from error
    remedy = (
        "step through step.model.manual_update only, which accumulates and clips"
        if bench.manual
        else "return objectives and leave the optimiser to the skeleton"
    )
    most = EPOCHS * -(-STEPS // every)
    # a manual method may have several updates a batch, but each of them accumulates
    if counter.steps == 0 or counter.steps % most:
        raise CheckFailed(
            bench.cls.__name__,
            "accumulation",
            f"{counter.steps} optimiser steps in {EPOCHS * STEPS} batches of {BATCH} when 2 are accumulated",
            remedy,
        )
    if counter.norm > clip * 1.01:
        raise CheckFailed(
            bench.cls.__name__,
            "accumulation",
            f"a gradient norm of {counter.norm:.3g} got past clipping at {clip}",
            remedy,
        )


def objectives_of(step: Step) -> dict[str, Tensor]:
    """Objectives of the checked plugin in a step."""
    return {k: v for k, v in step.objectives.items() if k.startswith(KEY + "/")}
