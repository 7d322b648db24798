"""Who runs what: claim files beside a ledger, so that two suites at once do not do one run twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: seconds without a sign of life after which a claim of another machine is given up
STALE_AFTER = 600.0
_BEAT = 30.0


def process_started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None where that cannot be told."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def is_alive(pid: int, started: str | None) -> bool:
    """Whether a process of this machine still runs, and is the one that started then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    now = process_started(pid)
    return started is None or now is None or now == started


class Claims:
    """Claims of the runs of one ledger.

    A claim names host and process. On the same host it ends with the process; one of another host is stale
    when its file has not been touched for ``stale_after`` seconds.

    Args:
        ledger: path of the ledger; claims are in ``<ledger>.claims``.
        stale_after: in seconds.
    """

    def __init__(self, ledger: Path, stale_after: float = STALE_AFTER) -> None:
        self.folder = ledger.with_name(f"{ledger.name}.claims")
        self.stale_after = stale_after

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def holder(self, key: str) -> dict[str, Any] | None:
        """The live claim on a key, if there is one."""
        path = self.folder / f"{key}.json"
        try:
            claim, touched = json.loads(path.read_text()), path.stat().st_mtime
        except FileNotFoundError:
            return None
        except ValueError:  # written in one piece under the lock: a torn one is left from a crash
            return None
        if claim.get("host") == socket.gethostname():
            return claim if is_alive(claim["pid"], claim.get("started")) else None
        return claim if time.time() - touched < self.stale_after else None

    def take(self, key: str, done: Any = None) -> bool:
        """Claim a key for this process.

        Args:
            key: of the run.
            done: called under the lock: whether the run is finished meanwhile.

        Returns:
            False where another has it, or where it is done.
        """
        with self._locked():
            if self.holder(key) is not None or (done is not None and done()):
                return False
            pid = os.getpid()
            claim = {
                "host": socket.gethostname(),
                "pid": pid,
                "started": process_started(pid),
                "time": time.time(),
            }
            (self.folder / f"{key}.json").write_text(json.dumps(claim))
            return True

    def release(self, key: str) -> None:
        """Give a key back."""
        with self._locked():
            (self.folder / f"{key}.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def beating(self, key: str) -> Iterator[None]:
        """Touch the claim now and then, and release it at the end."""
        over, path = threading.Event(), self.folder / f"{key}.json"

        def beat() -> None:
            while not over.wait(_BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            self.release(key)
