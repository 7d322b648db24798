"""What a plan across feature spaces takes, and what the machine has."""

from __future__ import annotations

from pathlib import Path

from uda.errors import UDAError

#: Matrices of a plan's size that a solver holds at once: cost and its constant part, kernel, plan, prior, temporaries.
MATRICES = 10


def bytes_needed(n: int, d: int, m: int, e: int, itemsize: int = 8) -> int:
    """Peak of a solver for matrices ``[n, d]`` and ``[m, e]``, estimated from above."""
    return itemsize * (MATRICES * (n * m + d * e) + 4 * (n * d + m * e) + n * e + m * d)


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def available(device: str = "cpu") -> int:
    """Bytes that may be allocated now: of the machine or, where it is less, of this container; or of a CUDA device."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        found.append(max(limit - used, 0))
    return min(found, default=8 * 2**30)


def fitting_rows(source: tuple[int, int], target: tuple[int, int], most: int | None, device: str = "cpu") -> int:
    """Rows a domain that a plan can have: at most ``most``, and no more than fits into half of the memory.

    Args:
        source: ``(n, d)``; target: ``(m, e)``; most: None for no bound of one's own.

    Raises:
        UDAError: the features alone do not fit, or ``most`` is below 2.
    """
    if most is not None and most < 2:
        raise UDAError(f"max_samples must be 2 or more, got {most}.")
    (n, d), (m, e) = source, target
    room, itemsize = available(device) // 2, 8 if device == "cpu" else 4
    rows = min(max(n, m), most or max(n, m))
    while bytes_needed(min(n, rows), d, min(m, rows), e, itemsize) > room:
        rows = int(rows * 0.8)
        if rows < 2:
            raise UDAError(
                f"Plans between {d} and {e} features need {bytes_needed(2, d, 2, e, itemsize) / 2**30:.1f} GiB, and "
                f"half of what is free is {room / 2**30:.1f} GiB: reduce the features first, by PCA for example."
            )
    return rows
