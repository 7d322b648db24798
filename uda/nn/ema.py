"""Teachers that follow a student by an exponential moving average (Tarvainen & Valpola, 2017)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from uda.errors import UDAError

Modules = nn.Module | Sequence[nn.Module]


def _as_list(modules: Modules) -> list[nn.Module]:
    return [modules] if isinstance(modules, nn.Module) else list(modules)


class EMATeacher(nn.Module):
    """A frozen copy of one or more modules; always in evaluation mode, never in the optimiser.

    Args:
        modules: what to copy, such as ``[backbone, bottleneck, head]``; ``forward`` applies the copies in
            this order.
        buffers: what ``update`` does with floating-point buffers such as BatchNorm statistics: ``"copy"`` the
            student's, ``"average"`` as the parameters, or ``"none"``. Other buffers (counters) are copied,
            except under ``"none"``.
    """

    def __init__(self, modules: Modules, buffers: Literal["copy", "average", "none"] = "copy") -> None:
        super().__init__()
        if buffers not in ("copy", "average", "none"):
            raise UDAError(f"Unknown treatment of buffers {buffers!r}: use 'copy', 'average' or 'none'.")
        self.buffer_mode = buffers
        self.copies = nn.ModuleList(copy.deepcopy(m) for m in _as_list(modules))
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in evaluation mode, whatever the model around it does."""
        return super().train(False)

    def forward(self, x: Any) -> Any:
        """Apply the copies one after the other."""
        for module in self.copies:
            x = module(x)
        return x

    def _pairs(self, student: Modules, kind: str) -> tuple[list[Tensor], list[Tensor]]:
        students = _as_list(student)
        mine = [dict(getattr(m, kind)()) for m in self.copies]
        theirs = [dict(getattr(m, kind)()) for m in students]
        if [list(m) for m in mine] != [list(t) for t in theirs]:
            raise UDAError(
                f"The student's {kind.removeprefix('named_')} differ from the teacher's. Give the modules "
                "that the teacher was made of, in the same order, and make it after any model surgery."
            )
        return [t for m in mine for t in m.values()], [t for m in theirs for t in m.values()]

    @torch.no_grad()
    def update(self, student: Modules, momentum: float) -> None:
        """``teacher = momentum * teacher + (1 - momentum) * student``.

        Args:
            student: the modules that the teacher was copied from.
            momentum: share of the teacher that stays, in [0, 1].

        Raises:
            UDAError: for another structure or a momentum out of range.
        """
        if not 0 <= momentum <= 1:
            raise UDAError(f"The momentum of a teacher lies in [0, 1], not {momentum}.")
        mine, theirs = self._pairs(student, "named_parameters")
        if mine:
            torch._foreach_lerp_(mine, [t.detach() for t in theirs], 1 - momentum)
        if self.buffer_mode == "none":
            return
        for m, t in zip(*self._pairs(student, "named_buffers"), strict=True):
            if self.buffer_mode == "average" and m.is_floating_point():
                m.lerp_(t, 1 - momentum)
            else:
                m.copy_(t)
