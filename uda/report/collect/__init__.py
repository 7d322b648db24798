"""What a report is made of: a run's files, and the outputs of one of its checkpoints."""

from __future__ import annotations

from uda.report.collect.files import read_run, short_names
from uda.report.collect.model import evaluate
from uda.report.collect.run import Outcome, Run, Which

__all__ = ["Outcome", "Run", "Which", "evaluate", "read_run", "short_names"]
