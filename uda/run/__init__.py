"""What surrounds a run: its directory, logs, checkpoints, summary and predictions."""

from __future__ import annotations

from uda.run.directory import RunDirectory, run_of_checkpoint
from uda.run.predictions import PredictionWriter
from uda.run.summary import RunSummary, config_hash

__all__ = ["PredictionWriter", "RunDirectory", "RunSummary", "config_hash", "run_of_checkpoint"]
