"""Whether a plugin leaves alone what is around it: switches of torch, the trainer, random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from uda.testing.bench import Bench, difference, state_of
from uda.testing.report import CheckFailed, Report
from uda.testing.undisturbed import undisturbed

SETTINGS = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "gradient_clip_val", "precision", "num_devices",
    "check_val_every_n_epoch", "log_every_n_steps", "limit_train_batches", "limit_val_batches",
)  # fmt: skip


def switches() -> dict[str, Any]:
    """Global switches of torch that a plugin has no business with."""
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
        "number of threads": torch.get_num_threads(),
    }


def _restore(state: dict[str, Any]) -> None:
    torch.set_default_dtype(state["default dtype"])
    torch.set_grad_enabled(state["grad mode"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_anomaly_enabled(state["anomaly detection"])
    torch.set_float32_matmul_precision(state["float32 matmul precision"])
    torch.backends.cudnn.benchmark = state["cudnn.benchmark"]
    torch.backends.cudnn.deterministic = state["cudnn.deterministic"]
    torch.set_num_threads(state["number of threads"])


def _settings(trainer: Any) -> dict[str, Any]:
    return {**{n: getattr(trainer, n) for n in SETTINGS}, "callbacks": [id(c) for c in trainer.callbacks]}


@contextlib.contextmanager
def kept_globals() -> Iterator[dict[str, Any]]:
    """Put torch's switches back at the end; gives their values at the start."""
    before = switches()
    try:
        yield before
    finally:
        _restore(before)


def global_state(bench: Bench, report: Report) -> None:
    """Torch's switches and the trainer stay as they are; the caller's random numbers have no influence."""
    model, trainer, data = bench.built(), bench.trainer(), bench.data()
    before = _settings(trainer)
    torch.manual_seed(12)
    with kept_globals() as were:
        trainer.fit(model, data)
        are = switches()
    if wrong := [k for k in were if were[k] != are[k]]:
        raise CheckFailed(
            bench.cls.__name__,
            "global_state",
            f"it leaves torch's {wrong[0]} at {are[wrong[0]]}",
            "set no global switch; use a context manager (torch.no_grad, torch.autocast) where one is "
            "needed",
        )
    after = _settings(trainer)
    if wrong := [k for k in before if before[k] != after[k]]:
        raise CheckFailed(
            bench.cls.__name__,
            "global_state",
            f"it changes trainer.{wrong[0]}",
            "leave the trainer alone: say in data_needs, manual or unused_parameters what the method "
            "wants",
        )
    if wrong := difference(undisturbed(bench).state, state_of(model)):
        raise CheckFailed(
            bench.cls.__name__,
            "global_state",
            f"two runs of one seed differ in {wrong[0]!r} when other random numbers were drawn before them",
            "draw in hooks of a step from torch's default generator (it is seeded for each step), or from "
            "a generator "
            "made from model.base_seed; draw nothing at build that a seed does not fix",
        )
