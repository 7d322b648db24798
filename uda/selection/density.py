"""Soft neighbourhood density."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn.precision import no_autocast
from uda.selection.pool import PoolScore, ScorePool

_CHUNK = 16_777_216  # similarities at a time: 64 MiB in float32


def soft_neighbourhood_density(logits: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean entropy of each sample's similarity to all others; in ``[0, log(N - 1)]``, logits ``[N, C]``.

    ``mean_i H(softmax_{j != i}(<p_i, p_j> / T))`` with softmax predictions scaled to unit length (Saito et
    al. 2021). The value grows with N: compare models on the same N. Rows are taken in chunks, so
    that memory is linear in N (about 0.25 GB beside the logits). The MixVal repository takes raw logits in
    place of softmax predictions, which is another score. It and skada leave the diagonal in with similarity
    ``-1``, which adds nothing above 1e-8 where the others are not negative. Fails on collapse: it is largest
    when all predictions are equal.
    """
    if logits.ndim != 2 or len(logits) < 2:
        raise UDAError(
            f"Soft neighbourhood density needs logits [N, C] of two rows or more, got {tuple(logits.shape)}."
        )
    with no_autocast(logits):
        p = F.normalize(logits.detach().float().softmax(1), dim=1)
        total = torch.zeros((), dtype=torch.float64)
        rows = max(1, _CHUNK // len(p))
        for start in range(0, len(p), rows):
            similarity = (p[start : start + rows] @ p.T).div_(temperature)
            own = torch.arange(len(similarity), device=p.device)
            similarity[own, start + own] = -torch.inf
            log_sum = similarity.logsumexp(1)
            similarity[own, start + own] = 0.0  # 0 * -inf is no number
            q = (similarity - log_sum[:, None]).exp_()
            q[own, start + own] = 0.0
            total += (log_sum.double() - q.mul_(similarity).sum(1).double()).sum().cpu()
    return total / len(p)


class SoftNeighbourhoodDensity(PoolScore):
    """Metric form of :func:`soft_neighbourhood_density`."""

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool."""
        return soft_neighbourhood_density(pool.target_logits)
