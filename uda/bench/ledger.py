"""The ledger: JSON lines, append-only, one line a run; safe under several writers."""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class Ledger:
    """Records of runs in a file.

    A line is written whole, under a lock, at the end of the file. A line that a crash left torn is ended
    first and skipped in reading.

    Args:
        path: of the file; it and its folder are made on the first write.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def append(self, record: dict[str, Any]) -> None:
        """Add one record."""
        line = json.dumps(record, separators=(",", ":"), default=str).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(fd, line) :]
            os.fsync(fd)
        finally:
            os.close(fd)  # and the lock with it

    def read(self) -> list[dict[str, Any]]:
        """All records in order; empty where there is no file."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        records, torn = [], 0
        for line in lines:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict) and "key" in record:
                records.append(record)
            else:
                torn += 1
        if torn:
            warnings.warn(
                f"{self.path}: {torn} line(s) are no records (torn by a crash?) and are left out",
                stacklevel=2,
            )
        return records

    def finished(self) -> dict[str, dict[str, Any]]:
        """Latest finished record of each key."""
        return {r["key"]: r for r in self.read() if r.get("status") == "finished"}

    def failures(self) -> dict[str, int]:
        """How often each key has failed."""
        out: dict[str, int] = {}
        for record in self.read():
            if record.get("status") == "failed":
                out[record["key"]] = out.get(record["key"], 0) + 1
        return out


def latest(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Finished records, the last of each (suite, task, method, seed): a changed config replaces the old."""
    out: dict[tuple[Any, ...], dict[str, Any]] = {}
    for r in records:
        if r.get("status") == "finished":
            out[r.get("suite"), r["task"], r["method"], r["seed"]] = r
    return list(out.values())
