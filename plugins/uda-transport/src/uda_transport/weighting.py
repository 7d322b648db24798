"""Double-weighting kernel mean matching: weights of training samples and of test samples under covariate shift.

Segovia-Martin, Mazuelas and Liu, "Double-Weighting for Covariate Shift Adaptation", ICML 2023. No transport: weights
stand where a plan would move samples.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, minimize
from scipy.spatial.distance import cdist, pdist

from uda.errors import UDAError


def median_width(x: np.ndarray, most: int = 1000) -> float:
    """Median distance between rows of ``[n, d]`` (the first ``most``): the width s of ``exp(-|a - b|^2 / (2 s^2))``."""
    found = float(np.median(pdist(x[:most])))
    return found if found > 0 else 1.0


def gaussian_gram(x: np.ndarray, y: np.ndarray, width: float) -> np.ndarray:
    """``exp(-|x_i - y_j|^2 / (2 width^2))`` ``[n, m]``."""
    return np.exp(-cdist(x, y, "sqeuclidean") / (2 * width**2))


def double_weights(
    x: np.ndarray,
    t: np.ndarray,
    leave: float = 0.0,
    width: float | None = None,
    most: float = 1000.0,
    max_iter: int = 500,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights that make the mean embeddings of training and test samples meet (the paper's DW-KMM).

    ``min | mean_i b_i k(x_i) - mean_j a_j k(t_j) |^2`` in the space of a Gaussian kernel, subject to
    ``0 <= b <= most (1 - leave)``, ``0 <= a <= 1``, ``|mean b - mean a| <= 1 - 1/sqrt(n)`` and
    ``|a - 1| <= leave sqrt(m)``. In the paper's notation ``leave = 1 - 1/sqrt(D)``. With ``leave = 0`` all a are 1:
    kernel mean matching. Larger values let test samples count less that lie where no training sample is.

    A convex quadratic programme, solved by L-BFGS-B in an augmented Lagrangian of the three joint constraints.

    Args:
        x: training samples ``[n, d]``; t: test samples ``[m, d]``.
        leave: in [0, 1).
        width: of the kernel; None: the median distance of all samples.
        most: bound of the training weights.
        max_iter: of each inner descent.

    Returns:
        ``b [n]`` and ``a [m]``.

    Raises:
        UDAError: a share outside [0, 1), features that differ in number, values that are not finite.
    """
    x, t = np.asarray(x, dtype=np.float64), np.asarray(t, dtype=np.float64)
    if x.ndim != 2 or t.ndim != 2 or x.shape[1] != t.shape[1] or not (len(x) and len(t)):
        raise UDAError(f"double weighting takes two arrays [samples, features] of one width, not {x.shape}, {t.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(t).all()):
        raise UDAError("double weighting: features have NaN or infinite values.")
    if not 0 <= leave < 1:
        raise UDAError(f"double weighting: leave must be in [0, 1), got {leave}.")
    n, m = len(x), len(t)
    both = np.concatenate([x, t])
    gram = gaussian_gram(both, both, median_width(both) if width is None else width)
    sign = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)])
    slack, radius = 1 - n**-0.5, leave**2  # of the means; of mean((a - 1)^2)
    bounds = Bounds(
        np.concatenate([np.zeros(n), np.full(m, 0.0 if leave else 1.0)]),
        np.concatenate([np.full(n, most * (1 - leave)), np.ones(m)]),
    )

    def constraints(w: np.ndarray) -> np.ndarray:  # each at most 0
        gap = w[:n].mean() - w[n:].mean()
        return np.array([gap - slack, -gap - slack, ((w[n:] - 1) ** 2).mean() - radius])

    scale = float(n + m)  # weights are of order 1 and gradients of order 1 / n, and L-BFGS stops by absolute figures

    def lagrangian(w: np.ndarray, price: np.ndarray, stiffness: float) -> tuple[float, np.ndarray]:
        pull = gram @ (sign * w)
        force = np.maximum(0.0, price + stiffness * constraints(w))
        gradient = 2 * sign * pull + (force[0] - force[1]) * sign
        gradient[n:] += force[2] * 2 * (w[n:] - 1) / m
        value = float((sign * w) @ pull) + float((force**2).sum()) / (2 * stiffness)
        return scale * value, scale * gradient

    w, price, stiffness = np.ones(n + m), np.zeros(3), 1.0
    for _ in range(20):
        w = minimize(
            lagrangian, w, (price, stiffness), jac=True, method="L-BFGS-B", bounds=bounds,
            options={"maxiter": max_iter, "maxfun": 2 * max_iter},
        ).x  # fmt: skip
        over = constraints(w)
        price = np.maximum(0.0, price + stiffness * over)
        if over.max() <= 1e-5:
            break
        stiffness = min(stiffness * 3, 1e4)
    return w[:n], w[n:]
