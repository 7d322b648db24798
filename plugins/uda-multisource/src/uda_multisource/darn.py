"""Domain Aggregation Networks for Multi-Source Domain Adaptation (Wen, Greiner and Schuurmans, ICML 2020)."""

from __future__ import annotations

import torch
from torch import Tensor

import uda
from uda.nn import full, no_autocast
from uda_multisource.several import AdversaryPerSource, over_ranks


def aggregation_weights(losses: Tensor) -> Tensor:
    """``argmin <a, g> + |a|_2`` over the simplex, for losses g ``[M]``: sparse, largest where the loss is least.

    The solution is ``relu(nu - g)`` made to sum 1, with nu such that ``|relu(nu - g)|_2 = 1`` (Wen et al. 2020, section
    4). With the k least losses, of mean m and squared deviations v from it in all, ``nu = m + sqrt((1 - v) / k)``; k is
    the largest number for which nu exceeds the k-th loss. Solved at once, where the authors' code searches.
    """
    with no_autocast(losses):
        g = full(losses.detach()) - losses.detach().min()  # differences alone matter; small numbers keep their digits
        ordered = g.sort().values
        k = torch.arange(1, len(g) + 1, device=g.device, dtype=g.dtype)
        mean = ordered.cumsum(0) / k
        spread = (ordered.square().cumsum(0) - k * mean.square()).clamp_min(0)
        nu = mean + ((1 - spread) / k).clamp_min(0).sqrt()
        valid = (spread < 1) & (nu > ordered)
        chosen = nu[valid.nonzero().max()]  # k = 1 always is
        weights = (chosen - g).clamp_min(0)
        return weights / weights.sum()


class DARN(AdversaryPerSource):
    """Sources of small loss count, others not at all (Wen et al. 2020).

    ``sum_i a_i l_i + |a|_2 / gamma`` with ``a`` of :func:`aggregation_weights` at ``gamma l``, and
    ``l_i = e_i + weight d_i``. By the envelope theorem its gradient is that of the l_i with a held fixed. The paper's
    loss is gamma times this, which a fixed learning rate would feel. See
    :class:`~uda_multisource.several.AdversaryPerSource` for e_i and d_i.

    Args:
        sharpness: the paper's gamma; large: only the best source, small: all alike.
        weight, gamma, hidden, layers, batch_norm, lr_scale: as in
            :class:`~uda_multisource.several.AdversaryPerSource`; its ``gamma`` is that of the reversal.
    """

    def __init__(
        self,
        sharpness: float = 1.0,
        weight: float = 0.02,
        gamma: float = 0.0,
        hidden: int = 1024,
        layers: int = 0,
        batch_norm: bool = True,
        lr_scale: float = 50.0,
    ) -> None:
        super().__init__(weight, gamma, hidden, layers, batch_norm, lr_scale)
        if sharpness <= 0:
            raise uda.UDAError(f"DARN: sharpness must be positive, not {sharpness}.")
        self.sharpness = sharpness

    def join(self, classification: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        """The losses by their weights, and the weights' norm."""
        losses = classification + domain
        weights = aggregation_weights(self.sharpness * over_ranks(losses))
        return (weights * losses).sum() + weights.norm() / self.sharpness, weights
