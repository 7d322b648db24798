"""Benchmarks that nobody types by hand: suites of runs, their ledger, and the tables made from it.

The command is ``uda bench``; ``docs/benchmarks.md`` says how to use it.
"""

from __future__ import annotations

from uda.bench.ledger import Ledger
from uda.bench.runner import Tally, run_all
from uda.bench.suite import Run, Suite

__all__ = ["Ledger", "Run", "Suite", "Tally", "run_all"]
