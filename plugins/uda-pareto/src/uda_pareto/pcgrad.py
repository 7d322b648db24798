"""Gradient surgery (Yu et al., NeurIPS 2020)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

import uda
from uda_pareto.combiner import Combiner, Matrix, Vector


def pcgrad(gram: Matrix, orders: Sequence[Sequence[int]]) -> Vector:
    """Weights of the sum of projected gradients (Yu et al. 2020, algorithm 1).

    ``g_i' = g_i``; for each other j in turn, where ``g_i' . g_j < 0``: ``g_i' -= (g_i' . g_j / |g_j|^2) g_j`` with the
    *original* ``g_j``. Each ``g_i'`` is a combination of the gradients, so inner products suffice.

    Args:
        gram: inner products ``[K, K]``.
        orders: for each i, the order in which the others are visited.

    Returns:
        ``[K]`` with ``sum_i g_i' = sum_k w_k g_k``.
    """
    rows = np.eye(len(gram))
    for i, order in enumerate(orders):
        for j in order:
            conflict = rows[i] @ gram[:, j]
            if conflict < 0:
                rows[i, j] -= conflict / gram[j, j]
    return rows.sum(0)


class PCGrad(Combiner):
    """Each gradient is freed of what runs against another one, and the sum of the rest is taken.

    Without a conflict this is the plain sum. The random order of the paper is a function of run seed and step, so that
    all processes and a resumed run draw the same.

    Args:
        mean: divide by the number of objectives, as common implementations do; the paper sums.
        level: see :class:`~uda_pareto.combiner.Combiner`. Objectives on different samples are orthogonal at
            ``features`` and never projected there; ``bottleneck`` and ``parameters`` see all conflicts.
    """

    def __init__(self, mean: bool = False, level: str | None = None) -> None:
        super().__init__(level)
        self.mean = mean

    def solve(self, gram: Matrix, losses: Vector, step: uda.Step) -> Vector:
        """Projected sum, in an order drawn for this step."""
        draw = random.Random(f"{step.model.base_seed},{step.index}")
        size = len(gram)
        orders = [draw.sample([j for j in range(size) if j != i], size - 1) for i in range(size)]
        weights = pcgrad(gram, orders)
        return weights / size if self.mean else weights
