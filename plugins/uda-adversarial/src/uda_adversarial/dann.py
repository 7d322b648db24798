"""Domain-Adversarial Training of Neural Networks (Ganin & Lempitsky, ICML 2015; Ganin et al., JMLR 2016)."""

from __future__ import annotations

from torch import Tensor

import uda
from uda_adversarial.adversary import Adversary


class DANN(Adversary):
    """Features that a domain discriminator cannot tell apart (Ganin et al. 2016, equation 9).

    ``L = L_cls + weight * 1/2 (BCE(D(f_s), 1) + BCE(D(f_t), 0))`` with gradient reversal between features ``[B, F]``
    and discriminator D, so that one optimiser step plays both sides. Several sources are pooled.
    """

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The domain objective."""
        return {"domain": self.adversarial(step, step.pooled("features"), step.target.features)}
