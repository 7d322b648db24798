"""The target's class frequencies, estimated without a target label: BBSE and MLLS, with bootstrap intervals.

Both assume label shift: classes change their frequencies and nothing else, ``p_t(x | y) = p_s(x | y)``. Where the
inputs of a class change as well, both are biased, by as much as the classifier errs on the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.errors import UDAError

_TINY = 1e-12


@dataclass(frozen=True)
class PriorInterval:
    """An estimated class prior and its bootstrap interval, each ``[C]``."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


def class_prior(y: Any, num_classes: int) -> np.ndarray:
    """Share of each class among labels ``[N]``; float64 ``[C]``. Rows below 0 (no label) are left out."""
    y = np.asarray(y).astype(np.int64)
    y = y[(y >= 0) & (y < num_classes)]
    if not len(y):
        raise UDAError("a class prior needs at least one labelled row.")
    return np.bincount(y, minlength=num_classes) / len(y)


def total_variation(p: Any, q: Any) -> float:
    """``sum_c |p_c - q_c| / 2``: the share of samples that would have to change class, in [0, 1]."""
    return float(np.abs(np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)).sum() / 2)


def confusion_by_class(probs: Any, y: Any, soft: bool = False, weights: np.ndarray | None = None) -> np.ndarray:
    """``M[i, j] = p(prediction i | class j)`` on labelled rows; float64 ``[C, C]``, columns sum to one.

    Args:
        probs: class probabilities ``[N, C]``; the largest is the prediction, unless ``soft``.
        y: class ids ``[N]``, all in ``[0, C)``.
        soft: mean probabilities in place of counted predictions.
        weights: of the rows ``[N]``; with ``[B, N]`` the result is ``[B, C, C]``.

    Raises:
        UDAError: shapes that do not fit, or a class without a row.
    """
    probs, y = _probabilities(probs, "source"), np.asarray(y).astype(np.int64)
    n, c = probs.shape
    if y.shape != (n,) or y.min() < 0 or y.max() >= c:
        raise UDAError(f"source labels must be {n} class ids in [0, {c}), one a row of the probabilities.")
    if len(absent := np.flatnonzero(np.bincount(y, minlength=c) == 0)):
        raise UDAError(f"class {int(absent[0])} has no held-out source row, so its errors are unknown; hold back more.")
    told = probs if soft else np.eye(c)[probs.argmax(1)]
    true = np.eye(c)[y]
    if weights is None or np.ndim(weights) == 1:
        joint = told.T @ (true if weights is None else np.asarray(weights)[:, None] * true)
    else:  # one product a draw: all at once would hold B * N * C numbers
        joint = np.stack([told.T @ (w[:, None] * true) for w in np.asarray(weights)])
    return joint / np.maximum(joint.sum(-2, keepdims=True), _TINY)


def bbse_prior(
    source_probs: Any, source_y: Any, target_probs: Any, *, soft: bool = False, clip: bool = False
) -> np.ndarray:
    """Black box shift estimation: the ``q`` with ``M q = mu``, where ``mu`` are the target's predictions.

    ``M[i, j] = p_s(prediction i | class j)`` from **held-out** source rows and ``mu_i = p_t(prediction i)``
    (Lipton, Wang and Smola 2018, whose ``w`` is ``q / p_s(y)``). Needs no calibration.

    Args:
        source_probs: of held-out source rows ``[N_s, C]``; their labels ``source_y`` ``[N_s]``.
        target_probs: of target rows ``[N_t, C]``.
        soft: mean probabilities in place of counted predictions (their soft variant).
        clip: solve, cut negative shares off and scale to sum one, as published; else the least squares solution among
            all class distributions, which is the same where the solution is one and steadier where it is not.

    Returns:
        float64 ``[C]``, not negative, sum one.

    Raises:
        UDAError: shapes that do not fit, or a class without a held-out source row.
    """
    confusion = confusion_by_class(source_probs, source_y, soft)
    target_probs = _probabilities(target_probs, "target", confusion.shape[0])
    c = confusion.shape[0]
    mu = target_probs.mean(0) if soft else np.bincount(target_probs.argmax(1), minlength=c) / len(target_probs)
    return solve_prior(confusion, mu, clip)


def solve_prior(confusion: np.ndarray, mu: np.ndarray, clip: bool = False) -> np.ndarray:
    """The class distribution ``q`` ``[C]`` that best explains ``mu = confusion @ q`` (see :func:`bbse_prior`)."""
    c = len(mu)
    if clip:
        q = np.maximum(np.linalg.lstsq(confusion, mu, rcond=None)[0], 0.0)
        return q / q.sum() if q.sum() > 0 else np.full(c, 1 / c)
    from scipy.optimize import nnls

    # A heavy last row holds the sum at one; a light ridge picks the even answer where classes cannot be told apart.
    heavy, light = 1e3, 1e-4
    rows = np.vstack((confusion, np.full((1, c), heavy), light * np.eye(c)))
    q, _ = nnls(rows, np.concatenate((mu, [heavy], np.full(c, light / c))))
    return q / q.sum()


def mlls_prior(
    target_probs: Any, source_prior: Any, *, max_iter: int = 1000, tol: float = 1e-7, weights: np.ndarray | None = None
) -> np.ndarray:
    """Maximum likelihood label shift: the ``q`` that makes the target's rows most likely, by EM.

    ``q_c <- mean_i (q_c / p_c) p(c | x_i) / sum_k (q_k / p_k) p(k | x_i)`` (Saerens, Latinne and Decaestecker 2002);
    concave, so that EM finds the maximum. Needs **calibrated** probabilities: see
    :func:`uda.shift.calibration.bcts` (Alexandari, Kundaje and Shrikumar 2020).

    Args:
        target_probs: calibrated probabilities of target rows ``[N, C]``.
        source_prior: class shares ``[C]`` of the data that the classifier was trained on.
        max_iter: EM steps at most; ``tol``: largest change of a share at which to stop.
        weights: of the rows ``[N]``, or ``[B, N]`` for ``B`` estimates at once.

    Returns:
        float64 ``[C]`` (``[B, C]``), not negative, sum one. A class with no source share keeps none.

    Raises:
        UDAError: shapes that do not fit.
    """
    probs = _probabilities(target_probs, "target")
    prior = np.asarray(source_prior, dtype=np.float64)
    if prior.shape != probs.shape[1:] or prior.min() < 0 or abs(prior.sum() - 1) > 1e-3:
        raise UDAError(f"source_prior must be {probs.shape[1]} shares that sum to one, got {prior.tolist()}.")
    rows = np.ones(len(probs)) if weights is None else np.asarray(weights, dtype=np.float64)
    rows = np.atleast_2d(rows) / rows.sum(-1, keepdims=True)
    inverse = np.where(prior > 0, 1 / np.maximum(prior, _TINY), 0.0)
    q = np.repeat(prior[None], len(rows), axis=0)
    for _ in range(max_iter):
        ratio = q * inverse
        new = ratio * ((rows / np.maximum(ratio @ probs.T, _TINY)) @ probs)
        new /= new.sum(1, keepdims=True)
        done = np.abs(new - q).max() < tol
        q = new
        if done:
            break
    return q[0] if weights is None or np.ndim(weights) == 1 else q


def bootstrap_priors(
    source_probs: Any,
    source_y: Any,
    target_probs: Any,
    source_prior: Any,
    *,
    calibrated: Any | None = None,
    draws: int = 200,
    level: float = 0.95,
    seed: int = 0,
    soft: bool = False,
) -> dict[str, PriorInterval]:
    """BBSE and MLLS with percentile intervals from rows drawn again.

    BBSE draws held-out source rows (within each class) and target rows again, MLLS target rows only: the error of a
    calibration is not in its interval, and that of the label shift assumption in neither.

    Args:
        source_probs, source_y, target_probs: as in :func:`bbse_prior`.
        source_prior: as in :func:`mlls_prior`.
        calibrated: calibrated target probabilities ``[N_t, C]`` for MLLS; None: ``target_probs``.
        draws: bootstrap samples; ``level``: of the interval; ``seed``: of the draws.
        soft: as in :func:`bbse_prior`.

    Returns:
        ``{"bbse": PriorInterval, "mlls": PriorInterval}``.
    """
    target = _probabilities(target_probs, "target")
    smooth = target if calibrated is None else _probabilities(calibrated, "target", target.shape[1])
    y, c = np.asarray(source_y).astype(np.int64), target.shape[1]
    estimate = {
        "bbse": bbse_prior(source_probs, y, target, soft=soft), "mlls": mlls_prior(smooth, source_prior),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    n, groups = len(target), [np.flatnonzero(y == k) for k in range(c)]
    target_counts = rng.multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    source_counts = np.zeros((draws, len(y)))
    for rows in groups:
        source_counts[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=draws)
    told = target if soft else np.eye(c)[target.argmax(1)]
    mu = target_counts @ told / n
    confusion = confusion_by_class(source_probs, y, soft, source_counts)
    drawn = {
        "bbse": np.stack([solve_prior(m, v) for m, v in zip(confusion, mu, strict=True)]),
        "mlls": mlls_prior(smooth, source_prior, weights=target_counts, max_iter=300, tol=1e-5),
    }
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    out = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, ends, axis=0)
        # the estimate may lie outside of its percentiles at the edge of the simplex
        out[name] = PriorInterval(estimate[name], np.minimum(low, estimate[name]), np.maximum(high, estimate[name]))
    return out


def apart(interval: PriorInterval, prior: Any) -> Sequence[int]:
    """Classes whose interval leaves the shares ``prior`` ``[C]`` out."""
    prior = np.asarray(prior, dtype=np.float64)
    return [int(i) for i in np.flatnonzero((prior < interval.low - _TINY) | (prior > interval.high + _TINY))]


def _probabilities(probs: Any, whose: str, classes: int | None = None) -> np.ndarray:
    probs = np.asarray(probs, dtype=np.float64)
    if probs.ndim != 2 or not len(probs) or (classes is not None and probs.shape[1] != classes):
        wanted = f"[N, {classes or 'C'}]"
        raise UDAError(f"{whose} probabilities must have shape {wanted} with N > 0, got {list(probs.shape)}.")
    if not np.isfinite(probs).all() or probs.min() < 0 or np.abs(probs.sum(1) - 1).max() > 1e-2:
        raise UDAError(f"{whose} probabilities must be finite, not negative, and sum to one in each row.")
    return probs
