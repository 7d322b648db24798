"""What the benchmark scripts share: a ledger that is gone on with, and a stop between two of its runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def keys_of(ledger: Path) -> set[str]:
    """Keys of the runs that a ledger has; none where there is no file yet."""
    return {json.loads(line)["key"] for line in ledger.read_text().splitlines()} if ledger.exists() else set()


def stopper(minutes: float) -> Callable[[], None]:
    """To be called before each run: after so many minutes it ends the script with code 75, "call again"."""
    end = time.monotonic() + 60 * minutes

    def stop_in_time() -> None:
        if time.monotonic() > end:
            sys.exit(75)

    return stop_in_time
