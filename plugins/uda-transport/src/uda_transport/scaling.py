"""Two feature spaces on one scale: checks, and units in which the solvers' defaults fit any data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.errors import UDAError, check_choice

NORMALISE = ("zscore", "centre", "none")


@dataclass
class Scale:
    """An affine change of the columns of one domain: ``(x - shift) / factor``, ``[d]`` each."""

    shift: np.ndarray
    factor: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Into the units of the solver."""
        return (x - self.shift) / self.factor

    def undo(self, x: np.ndarray) -> np.ndarray:
        """Back into the units of the data."""
        return x * self.factor + self.shift


def checked(name: str, x: Any, classes: int = 1) -> np.ndarray:
    """Features as float64 ``[rows, columns]``; half precision is widened here and reaches no solver.

    Raises:
        UDAError: another shape, no column, NaN, nothing but constants, or fewer samples than classes.
    """
    x = np.asarray(x.detach().double().cpu().numpy() if hasattr(x, "detach") else x, dtype=np.float64)
    if x.ndim != 2 or min(x.shape) == 0:
        raise UDAError(f"Transport across spaces takes features [samples, columns], not the {name}'s shape {x.shape}.")
    if not np.isfinite(x).all():
        raise UDAError(f"The features of the {name} hold NaN or infinite values: clean or impute them first.")
    if (x.max(0) == x.min(0)).all():
        raise UDAError(f"All features of the {name} are constant: there is nothing to match.")
    if len(x) < classes:
        raise UDAError(f"The {name} has {len(x)} samples for {classes} classes: each class needs at least one.")
    return x


def common_scale(x: np.ndarray, y: np.ndarray, normalise: str = "zscore") -> tuple[Scale, Scale]:
    """Scales of both domains for which the product plan, which knows nothing, costs 1.

    Args:
        x: ``[n, d]``; y: ``[m, e]``.
        normalise: before that, ``zscore``: each column to mean 0 and variance 1 (a constant one to 0); ``centre``: the
            whole matrix to mean 0 and mean square 1; ``none``: the data are comparable as they are.
    """
    check_choice("transport across spaces", "normalise", normalise, NORMALISE)

    def own(z: np.ndarray) -> Scale:
        if normalise == "zscore":
            spread = z.std(0)
            return Scale(z.mean(0), np.where(spread > 1e-9 * max(spread.max(), 1e-300), spread, 1.0))
        if normalise == "centre":
            return Scale(np.full(z.shape[1], z.mean()), np.full(z.shape[1], z.std()))
        return Scale(np.zeros(z.shape[1]), np.ones(z.shape[1]))

    sx, sy = own(x), own(y)
    a, b = sx.apply(x), sy.apply(y)
    unit = max((a**2).mean() + (b**2).mean() - 2 * a.mean() * b.mean(), 1e-300) ** 0.5
    return Scale(sx.shift, sx.factor * unit), Scale(sy.shift, sy.factor * unit)


def map_features(x: np.ndarray, plan: Any, source: Scale, target: Scale) -> np.ndarray:
    """Source samples ``[n, d]`` in the target's features ``[n, e]``: ``sum_k x_ik Q_kl / sum_k Q_kl``, rescaled.

    A target feature that received no mass has its mean.
    """
    plan = plan.detach().cpu().double().numpy() if hasattr(plan, "detach") else plan
    received = plan.sum(0)
    moved = source.apply(x) @ plan
    return target.undo(np.divide(moved, received, out=np.zeros_like(moved), where=received > 0))
