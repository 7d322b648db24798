"""Unbalanced CO-Optimal Transport (Tran et al., AAAI 2023): as COOT, but samples and features may be left out.

``min_PQ sum (x_ik - y_jl)^2 P_ij Q_kl + <M, P> + rho_1 KL(P1 x Q1 | a) + rho_2 KL(P^T 1 x Q^T 1 | b)
+ eps KL(P | product) + eps KL(Q | product)``

The product of the marginals is penalised, not held: an outlier, or a feature that is noise, keeps little mass. Large
rho approaches COOT; where rho is small against the cost, all mass goes.
"""

from __future__ import annotations

import warnings

import numpy as np

from uda.errors import UDAError
from uda_transport.coot import Array, CrossPlans, transport_cost
from uda_transport.solvers import warn_once


def ucoot_objective(
    x: Array, y: Array, plans: tuple[Array, Array], rho: tuple[float, float], epsilon: float, prior: Array | None = None
) -> float:
    """The minimised sum, KL between measures of any mass included (the cost that POT reports has another entropy)."""
    import ot

    nx = ot.backend.get_backend(x, y)

    def kl(p: Array) -> float:
        """Against the uniform measure of mass 1."""
        size = 1
        for n in p.shape:
            size *= n
        return float((p * nx.log(p * size + 1e-300)).sum() - p.sum()) + 1.0

    p, q = plans
    masses = float(p.sum()), float(q.sum())
    value = transport_cost(x, y, p, q) * masses[0] * masses[1] + epsilon * (kl(p) + kl(q))
    for weight, axis in zip(rho, (1, 0), strict=True):
        a, b = p.sum(axis), q.sum(axis)
        value += weight * (masses[1] * kl(a) + masses[0] * kl(b) + (masses[0] - 1) * (masses[1] - 1))
    return value if prior is None else value + float((prior * p).sum())


def ucoot(
    x: Array,
    y: Array,
    reg_marginals: tuple[float, float] = (1.0, 1.0),
    epsilon: float = 0.05,
    prior: Array | None = None,
    features: Array | None = None,
    start: CrossPlans | None = None,
    max_iter: int = 50,
    tol: float = 1e-5,
    inner_iter: int = 500,
    inner_tol: float = 1e-6,
) -> CrossPlans:
    """Plans of the problem above, by ``ot.gromov.unbalanced_co_optimal_transport``.

    One epsilon serves both plans: POT 0.9.7 takes the features' value for the samples' plan as well. Where its plain
    Sinkhorn iterations underflow they are done again in the log domain, which is several times slower.

    Args:
        x: ``[n, d]``; y: ``[m, e]``; numpy arrays or torch tensors of float32 or float64.
        reg_marginals: rho of the side of x and of the side of y, in units of the squared difference.
        epsilon: of both plans, in the same units; positive.
        prior: M, additional cost of each pair of samples ``[n, m]``.
        features: feature plan to start from ``[d, e]``; None is the product of the weights. (The solver begins with the
            features, given the samples' plan, so a samples' plan is found for it first.)
        start: earlier result for arrays of the same sizes, to go on from.
        max_iter, tol: rounds, and the change of the samples' plan (sum of absolute values, of a mass near 1) that ends
            them.
        inner_iter, inner_tol: of the inner problems.

    Raises:
        UDAError: plans that are not finite or have lost all mass.
    """
    import ot.gromov

    if epsilon <= 0 or min(reg_marginals) <= 0:
        raise UDAError("Unbalanced CO-optimal transport needs positive epsilon and reg_marginals.")
    first = None
    if start is not None:
        first = (start.samples, start.features)
    elif features is not None:
        from uda_transport.coot import coot

        first = (coot(x, y, (epsilon, epsilon), prior, features, max_iter=1, inner_iter=100).samples, features)
    options = {
        "reg_marginals": reg_marginals, "epsilon": (epsilon, epsilon), "init_pi": first, "M_samp": prior,
        "alpha": (float(prior is not None), 0.0), "max_iter": max_iter, "tol": tol, "max_iter_ot": inner_iter,
        "tol_ot": inner_tol, "log": True,
    }  # fmt: skip
    for solver in ("sinkhorn", "sinkhorn_log"):
        duals = None if start is None or start.duals[0] != solver else start.duals[1]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                samples, plan_f, log = ot.gromov.unbalanced_co_optimal_transport(
                    x, y, unbalanced_solver=solver, init_duals=duals, **options
                )
            except ValueError as error:  # a plan that is not finite
                failure = str(error)
                continue
        mass = float(samples.sum())
        underflow = any("Numerical errors" in str(w.message) for w in caught)
        failure = "its kernel underflows" if underflow else f"the plan has mass {mass:.3g}"
        if np.isfinite(mass) and mass > 1e-6 and not underflow:
            break
    else:
        raise UDAError(
            f"Unbalanced CO-optimal transport collapsed: {failure}. Raise reg_marginals (here {reg_marginals}), which "
            f"hold the mass, or epsilon (here {epsilon}); and normalise the features."
        )
    steps = len(log["error"])
    converged = bool(float(log["error"][-1]) <= tol)
    if not converged:
        warn_once("ot.gromov.unbalanced_co_optimal_transport", "Raise epsilon or max_iter.")
    cost = transport_cost(x, y, samples, plan_f)
    duals = (solver, (log["duals_sample"], log["duals_feature"]))
    value = ucoot_objective(x, y, (samples, plan_f), reg_marginals, epsilon, prior)
    return CrossPlans(samples, plan_f, cost, value, steps, converged, duals)
