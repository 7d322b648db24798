"""The plain run of a plugin that several checks compare theirs with: it is made once a bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
from torch import Tensor

from uda.testing.bench import STEPS, Bench, Observed, state_of


class Undisturbed(NamedTuple):
    """A plain run.

    Attributes:
        model: after it; ``state``: its parameters and buffers.
        objectives: of each step; ``checkpoints``: files in mid-epoch, by the number of batches that were done.
    """

    model: Observed
    state: dict[str, Tensor]
    objectives: list[dict[str, float]]
    checkpoints: dict[int, str]


class _SaveAt(L.Callback):
    """Saves checkpoints after given batches, counted over the whole run."""

    def __init__(self, folder: str, batches: tuple[int, ...]) -> None:
        self.folder, self.batches, self.paths = folder, batches, dict[int, str]()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        done = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if done in self.batches:
            self.paths[done] = str(Path(self.folder) / f"batch{done}.ckpt")
            trainer.save_checkpoint(self.paths[done])


def undisturbed(bench: Bench) -> Undisturbed:
    """The plain run of a bench."""
    if bench.kept is None:
        model, saver = bench.built(), _SaveAt(bench.folder, (STEPS - 1, STEPS + 2))
        objectives = record(bench, model, callbacks=[saver])
        bench.kept = Undisturbed(model, state_of(model), objectives, saver.paths)
    return bench.kept


def record(bench: Bench, model: Observed, **options: Any) -> list[dict[str, float]]:
    """Objectives of each step of a training."""
    seen: list[dict[str, float]] = []
    model.onlooker = lambda step: seen.append({k: float(v.detach()) for k, v in step.objectives.items()})
    try:
        bench.train(model, **options)
    finally:
        model.onlooker = None
    return seen
