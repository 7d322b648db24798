"""Multiple-gradient descent (Désidéri 2012; Sener & Koltun, NeurIPS 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from scipy.optimize import nnls

import uda
from uda.errors import check_choice
from uda.nn import gather_rows
from uda_pareto.combiner import Combiner, Matrix, Vector

NORMALISATIONS = ("none", "l2", "loss", "loss+")


def min_norm(gram: Matrix) -> Vector:
    """Weights on the simplex of the shortest convex combination, ``argmin_a a^T M a`` (Sener & Koltun, equation 3).

    Solved exactly as one non-negative least-squares problem: for ``x = t a`` with ``a`` on the simplex,
    ``min_t |t G^T a|^2 + (1 - t)^2 = n / (1 + n)`` grows with ``n = a^T M a``.

    Args:
        gram: inner products ``[K, K]``.

    Returns:
        ``[K]``, non-negative, sum 1.
    """
    scale = np.trace(gram) / len(gram)
    if not scale > 0:
        return np.full(len(gram), 1 / len(gram))
    values, vectors = np.linalg.eigh(gram / scale)
    root = np.sqrt(values.clip(0))[:, None] * vectors.T
    ones = np.ones((1, len(gram)))
    x, _ = nnls(np.vstack([root, ones]), np.append(np.zeros(len(gram)), 1.0))
    return x / x.sum()


class MGDA(Combiner):
    """The direction that no objective resists, as short as it can be.

    ``min_a |sum_i a_i g_i|^2`` over the simplex: zero only at a Pareto-stationary point, else a descent direction for
    every objective. The smallest gradient has the largest say, so one weak objective can hold back all others;
    ``normalise`` sets gradients to comparable lengths before the weights are sought.

    Args:
        normalise: divisor of each gradient while the weights are sought: ``none`` (the paper's equation), ``l2`` its
            norm, ``loss`` the objective's value, ``loss+`` their product. The weights apply to the gradients as they
            are.
        level, keep_scale: see :class:`~uda_pareto.combiner.Combiner`. At level ``features`` this is MGDA-UB.
    """

    search_space: ClassVar[dict[str, Any]] = {**Combiner.search_space, "normalise": list(NORMALISATIONS)}

    def __init__(self, normalise: str = "none", level: str | None = None, keep_scale: bool = True) -> None:
        super().__init__(level, keep_scale)
        check_choice("MGDA", "normalise", normalise, NORMALISATIONS)
        self.normalise = normalise

    def values(self, objectives: uda.Objectives) -> Vector:
        """Mean of each objective over the ranks, where the normalisation needs it."""
        if not self.normalise.startswith("loss"):
            return super().values(objectives)
        here = torch.stack([v.detach().float() for v in objectives.values()])
        return gather_rows(here[None]).mean(0).double().cpu().numpy()

    def solve(self, gram: Matrix, losses: Vector, step: uda.Step) -> Vector:
        """Min-norm weights of the normalised gradients."""
        divisor = np.ones(len(gram))
        if self.normalise in ("l2", "loss+"):
            divisor = divisor * np.sqrt(gram.diagonal())
        if self.normalise.startswith("loss"):
            divisor = divisor * np.abs(losses).clip(1e-8)
        weights = min_norm(gram / np.outer(divisor, divisor))
        return weights * len(weights) if self.keep_scale else weights
