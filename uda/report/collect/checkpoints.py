"""Which file holds the weights that a report is on."""

from __future__ import annotations

from pathlib import Path

from uda.errors import UDAError
from uda.report.collect.run import Run, Which
from uda.run.directory import newest_checkpoint


def pick_checkpoint(run: Run, which: Which) -> Path:
    """The file that holds the weights of a rule.

    A fit keeps the last epoch and the selected one. The best epoch by target labels is kept only by chance, or by a
    ``ModelCheckpoint`` of every epoch: it is looked for by its step.

    Raises:
        UDAError: there is none.
    """
    folder = run.path / "checkpoints"
    if which == "last" and (found := newest_checkpoint(run.path)) is not None:
        return found
    if which == "selected" and (folder / "selected.ckpt").is_file():
        return folder / "selected.ckpt"
    if which == "oracle" and (row := run.row_of("oracle")) is not None:
        for file in sorted(folder.glob("*.ckpt")):
            if step_of(file) == row["step"]:
                return file
        raise UDAError(
            f"{run.path}: no checkpoint of the oracle's epoch {row['epoch']} (step {row['step']}) was kept, as nothing "
            "may be kept by target labels. Keep every epoch with a ModelCheckpoint(save_top_k=-1), or take "
            "--checkpoint last or selected."
        )
    if which == "oracle":
        raise UDAError(f"{run.path}: the target has no labels, so there is no oracle. Take --checkpoint last.")
    raise UDAError(f"{run.path}: no {which} checkpoint in {folder.name}/.")


def step_of(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint."""
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
