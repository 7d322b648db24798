"""Transport plans of mini-batches: POT's solvers in full precision, with their failures made visible.

A plan is a constant of the step. By the envelope theorem the gradient of an optimal transport cost is that of
``sum_ij P_ij C_ij`` with the plan P held fixed, so no solver is differentiated. Exact and unbalanced problems are
solved in float64 by numpy on the CPU (one small matrix travels there and back), entropic ones in torch where the
features are: in float64 on a CPU, in float32 elsewhere. Autocast is off in all of them: a cost of bfloat16 is off by
several per cent, and Sinkhorn iterations in float16 end in zeros.

POT is imported where it is used: a run with another method does not pay for its import.

A plan that is not finite, or that carries no mass, is an error. A solver that stops before its tolerance warns, once a
process and solver: its plan is used, and is usually near enough.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uda.errors import UDAError, check_choice
from uda.nn import full, no_autocast

REFERENCES = ("product", "ones")


class TransportWarning(UserWarning):
    """A transport solver stopped before its tolerance."""


@functools.cache
def warn_once(solver: str, advice: str) -> None:
    """Say once a process that a solver has not converged."""
    warnings.warn(
        f"{solver} stopped before it reached its tolerance; its plan is used all the same (said once). {advice}",
        TransportWarning,
        stacklevel=3,
    )


def check_plan(plan: Any, solver: str, advice: str) -> None:
    """Refuse a plan (array or tensor) that is not finite or has no mass.

    Raises:
        UDAError: with the advice.
    """
    total = float(plan.sum())
    if not np.isfinite(total) or total <= 0:
        raise UDAError(f"{solver} gave a plan of mass {total}. {advice}")


def _prepared(cost: Tensor) -> np.ndarray:
    """The cost as float64 on the CPU.

    Raises:
        UDAError: it is not finite.
    """
    matrix = np.ascontiguousarray(cost.detach().to("cpu", torch.float64).numpy())
    if not np.isfinite(matrix).all():
        raise UDAError(
            "The transport cost of this batch is not finite: features or logits are NaN or infinite. Lower the "
            "learning rate, clip gradients (trainer.gradient_clip_val), and check the inputs."
        )
    return matrix


@torch.no_grad()
def exact_plan(cost: Tensor) -> Tensor:
    """Optimal plan between uniform weights, by the network simplex.

    Args:
        cost: ``[n, m]``.

    Returns:
        Plan ``[n, m]`` of sum 1, rows ``1/n`` and columns ``1/m``; float32 (float64 for a float64 cost), on the
        cost's device, without gradient.

    Raises:
        UDAError: the cost or the plan is not finite.
    """
    import ot

    matrix = _prepared(cost)
    plan, log = ot.emd([], [], matrix, log=True, numItermax=1_000_000, center_dual=False)
    if log.get("warning") is not None:
        warn_once("ot.emd", "Take a smaller batch.")
    check_plan(plan, "ot.emd", "Check the features of the batch.")
    return torch.from_numpy(plan).to(cost.device, full(cost).dtype)


@torch.no_grad()
def unbalanced_plan(
    cost: Tensor,
    epsilon: float,
    tau: float,
    reference: str = "product",
    max_iter: int = 1000,
    tol: float = 1e-6,
) -> Tensor:
    """Plan with marginals that may be missed: ``min_P <C, P> + eps KL(P | R) + tau KL(P 1 | a) + tau KL(P^T 1 | b)``.

    a and b are uniform of sum 1. The solver works on ``exp(-C / eps)``, which underflows where a whole row of the cost
    is large. So row minima r and then column minima s are taken off first, and the solver is given ``a exp(-r / tau)``
    and ``b exp(-s / tau)``: since ``<r, P 1> + tau KL(P 1 | a) = tau KL(P 1 | a exp(-r / tau)) + constant``, the plan
    is the same.

    Args:
        cost: ``[n, m]``.
        epsilon: of the entropy, in units of the cost; tau: of the marginals.
        reference: R: ``product``, ``a b^T``; ``ones``, a matrix of ones (older code, where the entropy has no
            reference; it makes the plan heavier).
        max_iter, tol: when the solver stops (relative change of its scalings).

    Returns:
        Plan ``[n, m]``, of less mass where costs are large against tau; as from :func:`exact_plan`.

    Raises:
        UDAError: the cost is not finite, or the plan has no mass or is not finite.
    """
    import ot

    check_choice("unbalanced transport", "reference", reference, REFERENCES)
    matrix = _prepared(cost)
    n, m = matrix.shape
    row = matrix.min(1)
    column = (matrix - row[:, None]).min(0)
    measure = np.full((n, m), 1 / (n * m) if reference == "product" else 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is looked at below
        plan, log = ot.unbalanced.sinkhorn_knopp_unbalanced(
            np.exp(-row / tau) / n, np.exp(-column / tau) / m, matrix - row[:, None] - column, epsilon, tau, c=measure,
            numItermax=max_iter, stopThr=tol, log=True,
        )  # fmt: skip
    if not log["err"] or not log["err"][-1] <= tol:
        warn_once("ot.unbalanced.sinkhorn_knopp_unbalanced", "Raise epsilon or max_iter, or lower tau.")
    check_plan(
        plan,
        "Unbalanced transport",
        f"The costs (up to {matrix.max():.3g}) are too large for epsilon {epsilon} and tau {tau}: raise these, or "
        "lower the weights of the cost.",
    )
    return torch.from_numpy(plan).to(cost.device, full(cost).dtype)


@torch.no_grad()
def entropic_plan(cost: Tensor, epsilon: Tensor | float, max_iter: int = 1000, tol: float = 1e-6) -> Tensor:
    """Plan between uniform weights of ``min_P <C, P> + eps KL(P | a b^T)``, in the log domain, on the cost's device.

    Args:
        cost: ``[n, m]``.
        epsilon: in units of the cost.
        max_iter, tol: when the solver stops (norm of the violation of the second marginal).

    Returns:
        Plan ``[n, m]`` in the solver's precision: float64 on a CPU, float32 elsewhere.

    Raises:
        UDAError: the plan is not finite.
    """
    import ot

    with no_autocast(cost):
        cost = cost.detach().double() if cost.device.type == "cpu" else full(cost.detach())
        empty = cost.new_empty(0)
        plan, log = ot.bregman.sinkhorn_log(
            empty, empty, cost, epsilon, numItermax=max_iter, stopThr=tol, warn=False, log=True
        )
        check_plan(plan, "ot.bregman.sinkhorn_log", "Check that the features are finite, or raise epsilon.")
        if not log["err"] or not float(log["err"][-1]) <= tol:
            warn_once("ot.bregman.sinkhorn_log", "Raise epsilon or max_iter.")
        return plan
