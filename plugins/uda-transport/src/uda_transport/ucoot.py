"""Unbalanced CO-Optimal Transport (Tran et al., AAAI 2023): as COOT, but samples and features may be left out.

``min_PQ sum (x_ik - y_jl)^2 P_ij Q_kl + <M, P> + rho_1 KL(P1 x Q1 | a) + rho_2 KL(P^T 1 x Q^T 1 | b)
+ eps_s KL(P | product) + eps_f KL(Q | product)``

The product of the marginals is penalised, not held: an outlier, or a feature that is noise, keeps little mass. Large
rho approaches COOT; where rho is small against the cost, all mass goes.

The two plans are found in turn, each by ``ot.unbalanced``. (``ot.gromov.unbalanced_co_optimal_transport`` of POT 0.9.7
takes the features' epsilon for the samples' plan as well; with equal values both agree.)
"""

from __future__ import annotations

import warnings

import numpy as np

from uda.errors import UDAError
from uda_transport.coot import Array, CrossPlans, between, transport_cost
from uda_transport.solvers import warn_once


def ucoot_objective(
    x: Array,
    y: Array,
    plans: tuple[Array, Array],
    rho: tuple[float, float],
    epsilon: tuple[float, float],
    prior: Array | None = None,
) -> float:
    """The minimised sum, KL between measures of any mass included (the cost that POT reports has another entropy)."""
    import ot

    nx = ot.backend.get_backend(x, y)

    def kl(p: Array) -> float:
        """Against the uniform measure of mass 1."""
        size = 1
        for n in p.shape:
            size *= n
        return float((p * nx.log(p * size + 1e-38)).sum() - p.sum()) + 1.0

    p, q = plans
    masses = float(p.sum()), float(q.sum())
    value = transport_cost(x, y, p, q) * masses[0] * masses[1] + epsilon[0] * kl(p) + epsilon[1] * kl(q)
    for weight, axis in zip(rho, (1, 0), strict=True):
        a, b = p.sum(axis), q.sum(axis)
        value += weight * (masses[1] * kl(a) + masses[0] * kl(b) + (masses[0] - 1) * (masses[1] - 1))
    return value if prior is None else value + float((prior * p).sum())


def _block(
    cost: Array, epsilon: float, rho: tuple[float, float], dual: tuple | None, max_iter: int, tol: float
) -> tuple:
    """``min_P <C, P> + rho_1 KL(P1 | a) + rho_2 KL(P^T 1 | b) + eps KL(P | a b^T)``: plan, potentials, convergence.

    Row and column minima are taken off the cost and put into the weights, so that no row of the kernel underflows; see
    :func:`~uda_transport.solvers.unbalanced_plan`.
    """
    import ot

    nx = ot.backend.get_backend(cost)
    low = (lambda c, axis: c.min(axis)) if isinstance(cost, np.ndarray) else (lambda c, axis: c.amin(axis))
    n, m = cost.shape
    row = low(cost, 1)
    column = low(cost - row[:, None], 0)
    warm = None
    if dual is not None:
        warm = tuple(((f - taken) / epsilon).clip(-80, 80) for f, taken in zip(dual, (row, column), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a plan that is not finite, or has no mass, is seen below
        plan, log = ot.unbalanced.sinkhorn_knopp_unbalanced(
            nx.exp(-row / rho[0]) / n, nx.exp(-column / rho[1]) / m, cost - row[:, None] - column, epsilon, rho,
            c=nx.ones((n, m), type_as=cost) / (n * m), warmstart=warm, numItermax=max_iter, stopThr=tol, log=True,
        )  # fmt: skip
    duals = (epsilon * log["logu"] + row, epsilon * log["logv"] + column)
    return plan, duals, bool(log["err"]) and float(log["err"][-1]) <= tol


def ucoot(
    x: Array,
    y: Array,
    reg_marginals: tuple[float, float] = (1.0, 1.0),
    epsilon: tuple[float, float] = (0.05, 0.02),
    prior: Array | None = None,
    features: Array | None = None,
    start: CrossPlans | None = None,
    max_iter: int = 50,
    tol: float = 1e-5,
    inner_iter: int = 500,
    inner_tol: float = 1e-6,
) -> CrossPlans:
    """Plans of the problem above; inner problems start from the last potentials.

    Args:
        x: ``[n, d]``; y: ``[m, e]``; numpy arrays or torch tensors of float32 or float64.
        reg_marginals: rho of the side of x and of the side of y, in units of the squared difference.
        epsilon: of the samples' and of the features' plan, in the same units; positive.
        prior: M, additional cost of each pair of samples ``[n, m]``.
        features: feature plan to start from ``[d, e]``; None is the product of the weights.
        start: earlier result for arrays of the same sizes, to go on from.
        max_iter, tol: rounds, and the change of the objective, relative where it is above 1, that ends them.
        inner_iter, inner_tol: of the inner problems (relative change of their scalings).

    Raises:
        UDAError: plans that are not finite or have lost all mass.
    """
    if min(*epsilon, *reg_marginals) <= 0:
        raise UDAError("Unbalanced CO-optimal transport needs positive epsilon and reg_marginals.")
    d, e = x.shape[1], y.shape[1]
    q = start.features if start is not None else features
    if q is None:
        q = (x[:1].T * 0 + 1 / d) * (y[:1] * 0 + 1 / e)
    dual_s, dual_f = (None, None) if start is None else start.duals
    last, steps, settled = float("inf"), 0, False

    def cost_for(a: Array, b: Array, plan: Array, extra: Array | None) -> Array:
        """What a pair costs, given the other plan; the divergence of that plan's marginals is in it, once a unit."""
        left, right = plan.sum(1), plan.sum(0)
        cost = ((a**2) @ left)[:, None] + ((b**2) @ right)[None, :] - 2 * between(a, plan, b)
        for rho, marginal in zip(reg_marginals, (left, right), strict=True):
            cost = cost + rho * float(_plogp(marginal))
        return cost if extra is None else cost + extra

    while steps < max_iter and not settled:
        steps += 1
        mass = float(q.sum())
        rho = (reg_marginals[0] * mass, reg_marginals[1] * mass)
        p, dual_s, ok_s = _block(cost_for(x, y, q, prior), epsilon[0], rho, dual_s, inner_iter, inner_tol)
        mass = float(p.sum())
        if np.isfinite(mass) and mass > 1e-6:
            rho = (reg_marginals[0] * mass, reg_marginals[1] * mass)
            q, dual_f, ok_f = _block(cost_for(x.T, y.T, p, None), epsilon[1], rho, dual_f, inner_iter, inner_tol)
        kept = min(mass, float(q.sum()))
        if not np.isfinite(kept) or kept <= 1e-6:
            raise UDAError(
                f"Unbalanced CO-optimal transport collapsed: a plan has mass {kept:.3g}. Raise reg_marginals (here "
                f"{reg_marginals}), which hold the mass, or epsilon (here {epsilon}); and normalise the features."
            )
        value = ucoot_objective(x, y, (p, q), reg_marginals, epsilon, prior)
        settled = abs(last - value) <= tol * max(1.0, abs(value))
        last = value
    if not (converged := settled and ok_s and ok_f):
        warn_once("uda_transport.ucoot", "Raise epsilon, max_iter or inner_iter.")
    return CrossPlans(p, q, transport_cost(x, y, p, q), last, steps, converged, (dual_s, dual_f))


def _plogp(marginal: Array) -> Array:
    """``sum_k q_k log(q_k / v_k)`` against uniform v."""
    log = np.log if isinstance(marginal, np.ndarray) else (lambda v: v.log())
    return (marginal * log(marginal * len(marginal) + 1e-38)).sum()
