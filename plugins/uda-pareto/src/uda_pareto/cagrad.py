"""Conflict-averse gradient descent (Liu et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize

import uda
from uda.errors import check_choice
from uda_pareto.combiner import Combiner, Matrix, Vector


def cagrad(gram: Matrix, c: float = 0.5, rescale: str = "squared") -> Vector:
    """Weights of the conflict-averse direction (Liu et al. 2021, equations 3 to 5 and algorithm 1).

    With ``g_0`` the mean gradient and ``g_w = sum_i w_i g_i``, the dual ``min_w g_w . g_0 + c |g_0| |g_w|`` over the
    simplex gives ``d = g_0 + c |g_0| / |g_w| g_w``, which has the best worst-case decrease within ``c |g_0|`` of g_0.

    Args:
        gram: inner products ``[K, K]``; ``c``: radius relative to ``|g_0|``; 0 is the mean gradient.
        rescale: ``none`` (the paper's d), ``squared``: divide by ``1 + c^2``, ``linear``: by ``1 + c``.

    Returns:
        ``[K]`` with ``d = sum_k w_k g_k``.
    """
    size = len(gram)
    scale = np.trace(gram) / size
    m = gram / scale if scale > 0 else gram
    mean = np.full(size, 1 / size)
    radius = c * np.sqrt(max(mean @ m @ mean, 0.0))
    towards = m @ mean

    def dual(w: Vector) -> tuple[float, Vector]:
        mw = m @ w
        norm = np.sqrt(max(w @ mw, 0.0) + 1e-12)
        return w @ towards + radius * norm, towards + radius * mw / norm

    w = mean
    if radius > 0:
        found = minimize(
            dual, mean, jac=True, method="SLSQP", bounds=[(0, 1)] * size, options={"ftol": 1e-10, "maxiter": 100},
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(size)},
        )  # fmt: skip
        if np.isfinite(found.x).all():
            w = found.x.clip(0)
            w = w / w.sum()
    norm = np.sqrt(max(w @ m @ w, 0.0) + 1e-12)
    divisor = {"none": 1.0, "squared": 1 + c**2, "linear": 1 + c}[rescale]
    return (mean + radius / norm * w) / divisor


class CAGrad(Combiner):
    """Near the mean gradient, the direction that serves the worst-off objective best.

    Args:
        c: how far the direction may leave the mean gradient, relative to its length, in [0, 1); 0 is the mean.
        rescale: divisor of the direction: ``none``, ``squared`` (1 + c^2) or ``linear`` (1 + c).
        level, keep_scale: see :class:`~uda_pareto.combiner.Combiner`.
    """

    search_space: ClassVar[dict[str, Any]] = {**Combiner.search_space, "c": (0.1, 0.9)}

    def __init__(
        self, c: float = 0.5, rescale: str = "squared", level: str | None = None, keep_scale: bool = True
    ) -> None:
        super().__init__(level, keep_scale)
        if not 0 <= c < 1:
            raise uda.UDAError(f"CAGrad: c must be in [0, 1), got {c}.")
        check_choice("CAGrad", "rescale", rescale, ("none", "squared", "linear"))
        self.c, self.rescale = c, rescale

    def solve(self, gram: Matrix, losses: Vector, step: uda.Step) -> Vector:
        """The conflict-averse direction."""
        weights = cagrad(gram, self.c, self.rescale)
        return weights * len(weights) if self.keep_scale else weights
