"""Full precision inside mixed-precision training."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Context without autocast on the device of ``x``.

    Inputs keep their dtype: what was computed in half precision before must be cast, see :func:`full`.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def full(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()
