"""Gradient reversal and the ramp of its coefficient (Ganin & Lempitsky, 2015; Ganin et al., 2016)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from uda.errors import UDAError, nearest


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficient: float) -> Tensor:
        ctx.coefficient = coefficient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * -ctx.coefficient, None


def reverse_gradient(x: Tensor, coefficient: float = 1.0) -> Tensor:
    """``x`` itself, whose gradient is multiplied by ``-coefficient`` on the way back.

    What comes after learns at its full rate; only what reaches ``x`` is scaled.
    """
    return _Reverse.apply(x, float(coefficient))


def warm_start(progress: float, gamma: float = 10.0, low: float = 0.0, high: float = 1.0) -> float:
    """Ramp from ``low`` to ``high``: ``2 (high - low) / (1 + exp(-gamma p)) - (high - low) + low``.

    Args:
        progress: share p of the *whole* training that is done, in [0, 1] (Ganin et al., 2016, section 5.2.2).
        gamma: steepness.
    """
    span = high - low
    return 2 * span / (1 + math.exp(-gamma * progress)) - span + low


RAMPS = ("none", "linear", "warm_start")


def ramp(shape: str, progress: float) -> float:
    """Factor in [0, 1] that a weight grows by: ``none`` is 1, ``linear`` is p, ``warm_start`` is 2/(1+exp(-10p))-1.

    Raises:
        UDAError: unknown shape.
    """
    if shape not in RAMPS:
        raise UDAError(f"Unknown ramp {shape!r}. {nearest(shape, RAMPS)}")
    return {"none": 1.0, "linear": progress}[shape] if shape != "warm_start" else warm_start(progress)


def warm_start_iterations(iteration: int, alpha: float = 1.0, max_iters: int = 1000) -> float:
    """Ramp by optimiser steps, ``2 / (1 + exp(-alpha i / max_iters)) - 1``, as common re-implementations do.

    Not the same curve as :func:`warm_start`: with the defaults 0.46 at step 1000 and 0.96 at step 4000,
    however long the training is.
    """
    return warm_start(iteration / max_iters, gamma=alpha)
