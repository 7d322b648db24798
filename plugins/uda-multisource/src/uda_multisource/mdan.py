"""Adversarial Multiple Source Domain Adaptation (Zhao et al., NeurIPS 2018)."""

from __future__ import annotations

from torch import Tensor

import uda
from uda.errors import check_choice
from uda_multisource.several import AdversaryPerSource, over_ranks


def hard_join(classification: Tensor, domain: Tensor, ranking: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """``max_i e_i + min_i d_i``: the source that is worst, and the one that is told from the target best.

    Args:
        classification: e ``[M]``; domain: weighted d ``[M]``; ranking: constants to choose by (None: the values).
    """
    by_e, by_d = (classification, domain) if ranking is None else ranking
    return classification[by_e.argmax()] + domain[by_d.argmin()]


def soft_join(losses: Tensor, sharpness: float) -> Tensor:
    """``1/gamma log sum_i exp(gamma l_i)`` of losses ``[M]``; its gradient is their softmax."""
    return (sharpness * losses).logsumexp(0) / sharpness


class MDAN(AdversaryPerSource):
    """The worst of the sources counts, in a maximum or a soft one (Zhao et al. 2018, section 4).

    ``soft``: ``1/gamma log sum_i exp(gamma (e_i + weight d_i))``; ``hard``: ``max_i e_i + weight min_i d_i`` (the
    discriminator's loss is least where the domains are told apart best). See
    :class:`~uda_multisource.several.AdversaryPerSource` for e_i and d_i.

    Args:
        mode: ``soft`` or ``hard``.
        sharpness: the paper's gamma (10 in its code).
        weight, gamma, hidden, layers, batch_norm, lr_scale: as in
            :class:`~uda_multisource.several.AdversaryPerSource`; its ``gamma`` is that of the reversal.
    """

    def __init__(
        self,
        mode: str = "soft",
        sharpness: float = 10.0,
        weight: float = 0.02,
        gamma: float = 0.0,
        hidden: int = 1024,
        layers: int = 0,
        batch_norm: bool = True,
        lr_scale: float = 50.0,
    ) -> None:
        super().__init__(weight, gamma, hidden, layers, batch_norm, lr_scale)
        check_choice("MDAN", "mode", mode, ("soft", "hard"))
        if sharpness <= 0:
            raise uda.UDAError(f"MDAN: sharpness must be positive, not {sharpness}.")
        self.mode, self.sharpness = mode, sharpness

    def join(self, classification: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        """The maximum, hard or soft. The sources' weights are those of the gradient."""
        if self.mode == "hard":
            ranking = (over_ranks(classification), over_ranks(domain))
            chosen = (ranking[0] == ranking[0].max()).float()
            return hard_join(classification, domain, ranking), chosen
        losses = classification + domain
        mean = over_ranks(losses)
        weights = (self.sharpness * mean).softmax(0)
        # the value is the paper's at the losses of the whole batch; its gradient is the softmax of the losses
        return (weights * (losses - losses.detach())).sum() + soft_join(mean, self.sharpness), weights
