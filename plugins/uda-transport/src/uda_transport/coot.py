"""CO-Optimal Transport (Redko, Vayer, Flamary, Courty, NeurIPS 2020): samples and features matched together.

Two matrices with different rows and different columns, and no correspondence in either. One plan matches the rows, one
the columns; given one of them, the other is an ordinary transport problem, so they are found in turn. The problem is
not convex: what is found depends on the start (:func:`starts`).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.errors import UDAError
from uda_transport.solvers import check_plan, warn_once

Array = Any  # numpy array or torch tensor


@dataclass
class CrossPlans:
    """Plans between the rows and between the columns of two matrices ``[n, d]`` and ``[m, e]``.

    Attributes:
        samples: plan of the rows ``[n, m]``; features: of the columns ``[d, e]``.
        cost: ``sum (x_ik - y_jl)^2 P_ij Q_kl / (mass P mass Q)``, without any penalty.
        objective: what was minimised.
        steps: rounds of both plans; converged: whether they stopped by the tolerance, in all inner problems of the
            last round as well.
        duals: of the samples and of the features, for a warm start; None where they are not kept.
    """

    samples: Array
    features: Array
    cost: float
    objective: float
    steps: int
    converged: bool
    duals: tuple[Any, Any] = (None, None)


def _backend(x: Array, y: Array) -> Any:
    import ot

    return ot.backend.get_backend(x, y)


def base_costs(x: Array, y: Array, prior: Array | None = None) -> tuple[Array, Array]:
    """The parts of the two cost matrices that no plan changes (with uniform weights), ``[n, m]`` and ``[d, e]``."""
    rows = (x**2).mean(1)[:, None] + (y**2).mean(1)[None, :]
    return rows if prior is None else rows + prior, (x**2).mean(0)[:, None] + (y**2).mean(0)[None, :]


def between(x: Array, plan: Array, y: Array) -> Array:
    """``x plan y^T``, multiplied in the cheaper order."""
    (n, d), (e, m) = x.shape, (plan.shape[1], y.shape[0])
    left, right = n * d * e + n * e * m, d * e * m + n * d * m
    return (x @ plan) @ y.T if left <= right else x @ (plan @ y.T)


def transport_cost(x: Array, y: Array, samples: Array, features: Array) -> float:
    """``sum_ijkl (x_ik - y_jl)^2 P_ij Q_kl`` for plans of any marginals, over the product of their masses."""
    p, q = samples.sum(), features.sum()
    own = samples.sum(1) @ (x**2) @ features.sum(1) / (p * q) + samples.sum(0) @ (y**2) @ features.sum(0) / (p * q)
    return float(own - 2 * (between(x, features, y) * samples).sum() / (p * q))


def _scaled_start(cost: Array, alpha: Array | None) -> tuple[Array, Array]:
    """Potentials near ``alpha`` with ``cost - f - g >= 0`` and a zero in each row and column: no kernel underflows."""
    low = (lambda c, axis: c.min(axis)) if isinstance(cost, np.ndarray) else (lambda c, axis: c.amin(axis))
    g = low(cost - (low(cost, 1) if alpha is None else alpha)[:, None], 0)
    return low(cost - g[None, :], 1), g


def _block(cost: Array, epsilon: float, weights: tuple[Array, Array], dual: Any, max_iter: int, tol: float) -> tuple:
    """One transport problem: plan, potential of the rows, whether it converged."""
    import ot

    if epsilon == 0:
        plan, log = ot.emd(*weights, cost, numItermax=10_000_000, log=True)
        return plan, None, log.get("warning") is None
    f, g = _scaled_start(cost, dual)
    options = {"numItermax": max_iter, "stopThr": tol, "warn": False, "log": True}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan, log = ot.bregman.sinkhorn_knopp(*weights, cost - f[:, None] - g[None, :], epsilon, **options)
    error = float(log["err"][-1])
    if not caught and np.isfinite(error):
        nx = ot.backend.get_backend(cost)
        return plan, f + epsilon * nx.log(log["u"]), error <= tol
    options |= {"warmstart": (f, g), "print_period": 10}  # scalings beyond the range of floats: the slower iterations
    plan, log = ot.bregman.sinkhorn_stabilized(*weights, cost, epsilon, **options)
    converged = float(log["err"][-1]) <= tol
    if not converged:  # where the last iteration moved its scalings into the kernel, POT's plan lacks a factor
        plan = plan * (weights[0] / plan.sum(1))[:, None]
    return plan, log["alpha"], converged


def _entropy(plan: Array, epsilon: float, nx: Any) -> float:
    if epsilon == 0:
        return 0.0
    return epsilon * float((plan * nx.log(plan * (plan.shape[0] * plan.shape[1]) + 1e-38)).sum())


def coot(
    x: Array,
    y: Array,
    epsilon: tuple[float, float] = (0.05, 0.0),
    prior: Array | None = None,
    features: Array | None = None,
    start: CrossPlans | None = None,
    max_iter: int = 50,
    tol: float = 1e-5,
    inner_iter: int = 1000,
    inner_tol: float = 1e-6,
) -> CrossPlans:
    """Plans of ``min_PQ sum (x_ik - y_jl)^2 P_ij Q_kl + <M, P> + eps_s KL(P | product) + eps_f KL(Q | product)``.

    P and Q have uniform marginals. With ``epsilon = 0`` a plan is exact (network simplex, on the CPU in float64
    whatever the device), else entropic, where the arrays are. Inner problems start from the last potentials.

    Args:
        x: ``[n, d]``; y: ``[m, e]``; numpy arrays or torch tensors of float32 or float64.
        epsilon: of the samples' and of the features' plan, in units of the squared difference.
        prior: M, additional cost of each pair of samples ``[n, m]``.
        features: feature plan to start from ``[d, e]``; None is the product of the weights.
        start: earlier result for arrays of the same sizes, to go on from.
        max_iter, tol: rounds, and the relative change of the objective that ends them.
        inner_iter, inner_tol: of the entropic problems (norm of the violation of the second marginal).

    Raises:
        UDAError: plans that are not finite.
    """
    nx = _backend(x, y)
    (n, d), (m, e) = x.shape, y.shape
    rows = (nx.ones(n, type_as=x) / n, nx.ones(m, type_as=x) / m)
    columns = (nx.ones(d, type_as=x) / d, nx.ones(e, type_as=x) / e)
    base_s, base_f = base_costs(x, y, prior)
    dual_s, dual_f = (None, None) if start is None else start.duals
    plan_f = start.features if start is not None else features
    if plan_f is None:
        plan_f = columns[0][:, None] * columns[1][None, :]
    last, steps, settled = float("inf"), 0, False
    while steps < max_iter and not settled:
        steps += 1
        plan_s, dual_s, ok_s = _block(
            base_s - 2 * between(x, plan_f, y), epsilon[0], rows, dual_s, inner_iter, inner_tol
        )
        cost_f = base_f - 2 * between(x.T, plan_s, y.T)
        plan_f, dual_f, ok_f = _block(cost_f, epsilon[1], columns, dual_f, inner_iter, inner_tol)
        cost = float((cost_f * plan_f).sum())
        value = cost + _entropy(plan_s, epsilon[0], nx) + _entropy(plan_f, epsilon[1], nx)
        value += 0.0 if prior is None else float((prior * plan_s).sum())
        if not np.isfinite(value):
            raise UDAError(
                f"CO-optimal transport broke down at epsilon {epsilon} (the objective is {value}): raise epsilon, or "
                "normalise the features."
            )
        settled = abs(last - value) <= tol * max(1.0, abs(value))
        last = value
    check_plan(plan_s, "CO-optimal transport", "Check the features.")
    if not (converged := settled and ok_s and ok_f):
        warn_once("uda_transport.coot", "Raise epsilon, max_iter or inner_iter.")
    return CrossPlans(plan_s, plan_f, cost, last, steps, converged, (dual_s, dual_f))


def labelled_start(x: np.ndarray, y: np.ndarray, labels: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Feature plan ``[d, e]`` that suits the labelled target samples: each matched with all of its class, evenly.

    Args:
        x: ``[n, d]``; y: ``[m, e]``; labels: ``[n]``; known: ``[m]``, -1 where unlabelled; at least one is labelled.
    """
    import ot

    pairs = (known[None, :] >= 0) & (labels[:, None] == known[None, :])
    plan = pairs / np.maximum(pairs.sum(0, keepdims=True), 1)
    plan = plan / plan.sum()
    left, right = plan.sum(1) @ x**2, plan.sum(0) @ y**2
    return ot.emd([], [], left[:, None] + right[None, :] - 2 * between(x.T, plan, y.T), numItermax=10_000_000)


def starts(x: np.ndarray, y: np.ndarray, number: int, seed: int = 0) -> list[np.ndarray | None]:
    """Feature plans ``[d, e]`` to start from: None (the product), features matched by their spread, then random ones.

    A random start matches the features in two random orders. All have uniform marginals.
    """
    import ot

    draw, d, e = np.random.default_rng(seed), x.shape[1], y.shape[1]
    out: list[np.ndarray | None] = [None]
    for k in range(1, number):
        u, v = (x.std(0), y.std(0)) if k == 1 else (draw.random(d), draw.random(e))
        out.append(np.asarray(ot.emd_1d(u, v)))
    return out[:number]
