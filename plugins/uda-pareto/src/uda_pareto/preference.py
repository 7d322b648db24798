"""The small linear programs of ParetoDA (Lv et al., NeurIPS 2021), on inner products only."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from uda_pareto.combiner import Matrix, Vector
from uda_pareto.mgda import min_norm


def maximise(value: Vector, rows: Matrix, floor: Vector) -> Vector | None:
    """``argmax_a value . a`` over the simplex with ``rows @ a >= floor``, or None where nothing is feasible.

    Rows are scaled to a largest entry of 1, so that the solver's absolute tolerances mean the same at any size of the
    gradients; a row with a floor of minus infinity is left out.
    """
    bound = np.isfinite(floor)
    rows, floor = rows[bound], floor[bound]
    scale = np.maximum(np.abs(rows).max(1, initial=0.0), np.abs(floor)).clip(1e-300)
    size = len(value)
    found = linprog(
        -value / np.abs(value).max().clip(1e-300), A_ub=-rows / scale[:, None], b_ub=-floor / scale,
        A_eq=np.ones((1, size)), b_eq=[1.0], bounds=(0, None), method="highs",
    )  # fmt: skip
    if found.status != 0:
        return None
    a = found.x.clip(0)
    return a / a.sum()


def guided(gram: Matrix, guide: Vector) -> Vector:
    """Weights whose direction follows a guiding gradient g_v and harms no objective more than g_v would.

    ``max_a a . c`` over the simplex with ``c = G g_v`` and ``M = G G^T``, where J holds the objectives with ``c_j > 0``
    and j* the largest: ``(M a)_j >= c_j`` for j outside J, ``(M a)_{j*} >= 0``; where J is empty, ``M a >= 0``. Floors
    are never positive, so that the min-norm weights are always feasible; they are taken if the solver fails, and where
    the guide says nothing.

    Args:
        gram: ``[K, K]``; ``guide``: inner products ``[K]`` with g_v.
    """
    if not np.abs(guide).max() > 0:
        return min_norm(gram)
    agrees = guide > 0
    floor = np.where(agrees, -np.inf, guide) if agrees.any() else np.zeros(len(guide))
    if agrees.any():
        floor[guide.argmax()] = 0.0
    a = maximise(guide, gram, floor)
    return min_norm(gram) if a is None else a


def descent(gram: Matrix, guide: Vector, fallback: Vector | None = None) -> Vector:
    """Weights of the steepest common descent: ``max_a sum_j (M a)_j``, ``M a >= 0`` and ``a . c >= min(max_j c_j, 0)``.

    The last condition can be infeasible; then it is dropped, or ``fallback`` is taken where one is given.
    """
    total, size = gram.sum(0), len(guide)
    a = maximise(total, np.vstack([gram, guide]), np.append(np.zeros(size), min(guide.max(), 0.0)))
    if a is None and fallback is not None:
        return fallback
    if a is None:
        a = maximise(total, gram, np.zeros(size))
    return min_norm(gram) if a is None else a
