"""Interruptions at the border between two batches, where a checkpoint is exact."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L


class StopBetweenBatches(L.Callback):
    """Waits for the end of the batch before a signal is acted on.

    Within a batch the BatchNorm statistics may be ahead of the weights, so that a checkpoint taken by a
    signal handler would not resume to the same weights. Two signals are held back:

    - SLURM's requeue signal: Lightning's own handler (checkpoint, ``scontrol requeue``) runs after the batch.
    - Ctrl-C: ``last.ckpt`` is written after the batch, then the run stops; a second Ctrl-C stops at once.

    Args:
        checkpoint: where Ctrl-C leaves the state.
        requeue: the signal that SLURM sends.
    """

    def __init__(self, checkpoint: Path, requeue: int = signal.SIGUSR1) -> None:
        self.checkpoint, self.requeue = checkpoint, requeue
        self._pending: dict[int, Callable[..., Any]] = {}
        self._replaced: dict[int, Any] = {}
        self._in_batch, self._step = False, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put handlers before those that are there."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, self.requeue):
            handler = signal.getsignal(number)
            if callable(handler):
                self._replaced[number] = handler
                signal.signal(number, self._hold)

    def _hold(self, number: int, frame: Any) -> None:
        again = number in self._pending
        self._pending[number] = self._replaced[number]
        if number == signal.SIGINT and again:
            self._pending.clear()
            self._replaced[number](number, frame)
        elif number != signal.SIGINT and not self._in_batch:
            self._pending.pop(number)(number, frame)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """From here on, wait."""
        self._in_batch, self._step = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on what came during the batch; half accumulated gradients wait for their step."""
        accumulates = trainer.accumulate_grad_batches > 1 or getattr(pl_module, "manual_accumulate", 1) > 1
        if accumulates and trainer.global_step == self._step:
            return
        for number, handler in list(self._pending.items()):
            del self._pending[number]
            if number == signal.SIGINT:
                if trainer.world_size == 1:  # several ranks need not be at the same batch: saving could hang
                    trainer.save_checkpoint(self.checkpoint)
                raise KeyboardInterrupt
            handler(number, None)
        self._in_batch = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the handlers back."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced = {}
