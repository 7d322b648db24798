"""Partial Adversarial Domain Adaptation (Cao et al., ECCV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from uda_adversarial.adversary import Adversary

import uda
from uda.errors import check_choice
from uda_partial.weights import ClassWeighted

DOMAIN_MEANS = ("batch", "both", "weighted")


class PADA(ClassWeighted, Adversary):
    """DANN whose source samples count by how much the target seems to hold of their class.

    ``1/n_s sum gamma_y CE(C(f_s), y) + weight * 1/2 [mean_s gamma_y BCE(D(f_s), 1) + mean_t BCE(D(f_t), 0)]`` with the
    discriminator behind gradient reversal (Cao et al. 2018, equation 4) and ``gamma = mean_t softmax(z_t / T)``,
    divided by its largest entry (equation 3). So classes that the target lacks take little part in either.

    Args:
        temperature, normalise, warmup, every, mean: as in :class:`~uda_partial.weights.ClassWeights`.
        domain_mean: of the two halves of the domain objective. ``batch``: over the samples, as printed and in the
            authors' code, so that the source's half shrinks with its weights; ``both``: the target's half shrinks with
            it, as in a common re-implementation; ``weighted``: over the sum of the weights, so that neither does.
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    settings = ClassWeighted.settings
    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "temperature": [0.1, 0.3, 1.0]}

    def __init__(
        self,
        weight: float = 1.0,
        temperature: float = 1.0,
        normalise: str = "max",
        warmup: float = 0.1,
        every: int = 0,
        mean: str = "weighted",
        domain_mean: str = "batch",
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = False,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        Adversary.__init__(self, weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        self.set_estimate(temperature, normalise, warmup, every, mean)
        check_choice(type(self).__name__, "domain_mean", domain_mean, DOMAIN_MEANS)
        self.domain_mean = domain_mean

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator and class weights."""
        Adversary.build(self, model)
        self.make_estimate(model.num_classes)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The weighted domain objective."""
        source, target = step.pooled("features"), step.target.features
        weight = self.sample_weight(step.pooled("y"))
        of_target = weight.mean().expand(len(target)) if self.domain_mean == "both" else None
        mean = "weighted" if self.domain_mean == "weighted" else "batch"
        return {"domain": self.adversarial(step, source, target, weight, of_target, mean)}
