"""Which target samples are of the source's classes, by unbalanced transport (UniOT: Chang et al., NeurIPS 2022)."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from uda_transport.solvers import check_plan

from uda.nn import full

EPSILON, TAU = 0.01, 0.5  # of the entropy and of the marginals, for cosines


class Match(NamedTuple):
    """Unbalanced plan of samples and classes ``[N, C]`` of sum 1, its sum before that, and log scalings ``[C]``."""

    plan: Tensor
    total: float
    log_v: Tensor


@torch.no_grad()
def match(similarity: Tensor, beta: Tensor, tol: float = 1e-4, max_iter: int = 1000) -> Match:
    """``min_P <-S, P> + eps KL(P | 1) + tau KL(P 1 | 1/N) + tau KL(P^T 1 | beta)``, in float64 by POT.

    Args:
        similarity: cosines S ``[N, C]``; beta: mass of the classes ``[C]``, of sum 1.
        tol, max_iter: when the solver stops.

    Raises:
        UDAError: the plan is not finite.
    """
    import ot

    s = similarity.detach().cpu().double().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it warns of is looked at below
        plan, log = ot.unbalanced.sinkhorn_knopp_unbalanced(
            np.full(len(s), 1 / len(s)), beta.detach().cpu().double().numpy(), -s, EPSILON, TAU, c=np.ones_like(s),
            numItermax=max_iter, stopThr=tol, log=True,
        )  # fmt: skip
    check_plan(plan, "Unbalanced transport", "Check that the features are finite.")
    total, device = float(plan.sum()), similarity.device
    kind = full(similarity).dtype
    return Match(torch.from_numpy(plan / total).to(device, kind), total, torch.from_numpy(log["logv"]).to(device, kind))


def mass_of_rows(similarity: Tensor, log_v: Tensor, n: int) -> Tensor:
    """Logarithm of the rows ``[B, C]`` that samples have in an unbalanced plan of n rows with scalings ``log_v``.

    The row of a sample depends on the others only through ``log_v``: ``u_i = (1 / n / sum_j K_ij v_j)^(tau / (tau +
    eps))`` and ``P_ij = u_i K_ij v_j`` with ``K = exp(S / eps)``.
    """
    z = similarity / EPSILON + log_v
    return z - (math.log(n) + z.logsumexp(1, keepdim=True)) * TAU / (TAU + EPSILON)


def confident(found: Match) -> tuple[Tensor, Tensor]:
    """Class ``[N]`` of each row, and whether it is of a class that both domains seem to have ``[N]``.

    That is a largest entry above ``1 / N``, in a column with a mass of ``1 / C`` at least (equations 7 and 8).
    """
    value, label = found.plan.max(1)
    n, classes = found.plan.shape
    return label, (value > 1 / n) & (found.plan.sum(0) >= 1 / classes)[label]


def adaptive_filling(
    features: Tensor, prototypes: Tensor, beta: Tensor, gamma: float, generator: torch.Generator | None = None
) -> Tensor:
    """Similarities ``[N + fake, C]`` of rows of which about half are near a class; the given rows come last.

    Too few with a cosine above gamma: confident rows of a first plan are repeated. Too many: rows half way to the
    farthest prototype are added.

    Args:
        features: unit rows ``[N, F]``; prototypes: unit rows ``[C, F]``; beta: ``[C]``.
        generator: of the draws, on the CPU; None is torch's own.
    """
    similarity = features @ prototypes.T
    near = int((similarity.amax(1) > gamma).sum())
    fake = abs(len(similarity) - 2 * near)
    if fake == 0:
        return similarity
    if 2 * near <= len(similarity):
        rows = similarity[confident(match(similarity, beta))[1]]
    else:
        rows = F.normalize((features + prototypes[similarity.argmin(1)]) / 2, dim=1) @ prototypes.T
    if not len(rows):
        return similarity
    drawn = torch.randint(0, len(rows), (fake,), generator=generator).to(rows.device)
    return torch.cat([rows[drawn], similarity])
