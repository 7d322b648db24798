"""Manual optimisation that keeps clipping, accumulation and gradient averaging."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from uda.errors import UDAError, nearest
from uda.ranks import mean_over_ranks

if TYPE_CHECKING:
    from uda.module import UDA


class ManualUpdates:
    """Gradient buffers by phase, so that a method of several phases accumulates each on its own."""

    def __init__(self, model: UDA) -> None:
        self.model = model
        self.buffers: dict[str, dict[nn.Parameter, Tensor]] = {}

    def parameters(self, only: Iterable[str] | None) -> list[nn.Parameter]:
        """Trainable parameters of the optimiser groups named, or of all."""
        groups = self.model.optimizers(use_pl_optimizer=False).param_groups
        names = {g["name"] for g in groups}
        if only is not None:
            for name in only:
                if name not in names:
                    raise UDAError(f"No optimiser group {name!r} to update. {nearest(name, names)}")
        chosen = names if only is None else set(only)
        return [p for g in groups if g["name"] in chosen for p in g["params"] if p.requires_grad]

    def update(self, loss: Tensor, only: Iterable[str] | None, phase: str, stepping: bool, every: int, clip: float):
        """Add this batch's gradients to the phase; step and forget them when ``stepping``."""
        optimizer = self.model.optimizers()
        parameters = self.parameters(only)
        grads = torch.autograd.grad(loss / every, parameters, allow_unused=True, materialize_grads=True)
        buffer = self.buffers.setdefault(phase, {})
        for p, g in zip(parameters, grads, strict=True):
            buffer[p] = buffer[p] + g if p in buffer else g
        if not stepping:
            return
        optimizer.zero_grad(set_to_none=True)
        for p, g in zip(buffer, mean_over_ranks(list(buffer.values())), strict=True):
            p.grad = g
        if clip > 0:
            torch.nn.utils.clip_grad_norm_(list(buffer), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        buffer.clear()
