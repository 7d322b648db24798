"""Pictures of a domain's rows, as they are before any view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def pictures(data: Any) -> Callable[[Sequence[int]], list[np.ndarray]] | None:
    """A function from evaluation rows of the target to pictures, as they are before any view."""
    pools = data.task.target
    if pools.data.inputs.kind == "features":
        return None

    def fetch(rows: Sequence[int]) -> list[np.ndarray]:
        import torch

        raw = pools.data.inputs.fetch(torch.as_tensor(pools.eval.rows[np.asarray(rows, dtype=np.int64)]))
        return [picture(x) for x in raw]

    return fetch


def picture(x: Any) -> np.ndarray:
    """One input, a PIL image or a tensor ``[1 or 3, H, W]``, as uint8 ``[H, W, 3]``; other ranges are stretched."""
    if not hasattr(x, "numpy"):
        return np.asarray(x.convert("RGB"))
    a = np.asarray(x.numpy(), dtype=np.float64)
    if a.min() < -1e-6 or a.max() > 1 + 1e-6:
        a = (a - a.min()) / max(np.ptp(a), 1e-12)
    a = np.moveaxis(a[:3] if a.shape[0] >= 3 else np.repeat(a[:1], 3, axis=0), 0, -1)
    return np.round(255 * a.clip(0, 1)).astype(np.uint8)
