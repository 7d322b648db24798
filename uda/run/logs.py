"""Loggers in the run directory, and progress where the output is no terminal."""

from __future__ import annotations

import csv
from pathlib import Path

import lightning as L
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _Appending(ExperimentWriter):
    """Goes on with an existing ``metrics.csv``, where Lightning would delete it."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as rows:
                self.metrics_keys = list(next(csv.reader(rows), []))

    def forget_after(self, step: int) -> None:
        """Drop the rows from ``step`` on: a resumed run writes them again."""
        file = Path(self.metrics_file_path)
        if file.is_file():
            with file.open(newline="") as rows:
                kept = [r for r in csv.DictReader(rows) if r["step"] and int(r["step"]) < step]
            with file.open("w", newline="") as rows:
                writer = csv.DictWriter(rows, fieldnames=self.metrics_keys)
                writer.writeheader()
                writer.writerows(kept)


class RunCSVLogger(CSVLogger):
    """``metrics.csv`` straight in ``dirpath``, continued when a run is resumed."""

    def __init__(self, dirpath: str | Path) -> None:
        super().__init__(save_dir=dirpath, name="", version="")
        self._dirpath = str(dirpath)

    @property
    def log_dir(self) -> str:
        """The folder itself."""
        return self._dirpath

    @property
    @rank_zero_experiment
    def experiment(self) -> _Appending:
        """The writer."""
        if self._experiment is None:
            self._experiment = _Appending(log_dir=self._dirpath)
        return self._experiment


def run_loggers(folder: Path) -> list[Logger]:
    """CSV and TensorBoard in ``folder``."""
    return [RunCSVLogger(folder), TensorBoardLogger(folder.parent, name=folder.name, version="")]


class ForgetRepeated(L.Callback):
    """On resuming, drops logged rows that lie after the checkpoint."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ask the CSV logger to forget them."""
        if trainer.global_step and trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, RunCSVLogger):
                    logger.experiment.forget_after(trainer.global_step)


class PlainProgress(ProgressBar):
    """One line a validation, for log files."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True

    def disable(self) -> None:
        """Called by the trainer on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print step, loss and label-free figures."""
        if not self._enabled or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        shown = {
            k: v
            for k, v in trainer.callback_metrics.items()
            if k in ("train/loss", "source_accuracy", "select/im")
        }
        figures = "  ".join(f"{k} {float(v):.4f}" for k, v in shown.items())
        print(f"epoch {trainer.current_epoch}  step {trainer.global_step}  {figures}", flush=True)
