"""Conditional Adversarial Domain Adaptation (Long et al., NeurIPS 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.losses import RandomisedMap, entropy_weights, outer_product
from uda_adversarial.adversary import Adversary


class CDAN(Adversary):
    """A discriminator on the outer product of features and class probabilities (Long et al. 2018, equations 4 to 9).

    The discriminator sees ``f x g`` ``[B, C * F]`` with ``g`` the detached softmax, or, where that is wider than
    ``max_width``, the randomised map ``(R_f f) * (R_g g) / sqrt(d)``.

    Args:
        entropy: CDAN+E: weigh each sample by ``1 + exp(-H(g))``, so that easy samples count more. The weights are
            constants of the step and have mean 1 in each domain.
        max_width: widest outer product before the randomised map takes over (the paper: 4096).
        random_width: width d of the randomised map.
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "entropy": [False, True]}

    def __init__(
        self,
        entropy: bool = False,
        max_width: int = 4096,
        random_width: int = 1024,
        weight: float = 1.0,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        self.entropy, self.max_width, self.random_width = entropy, max_width, random_width
        self.randomised = False
        self.random_map: RandomisedMap | None = None

    def input_size(self, model: uda.UDA) -> int:
        """Width of the (randomised) product."""
        width = model.feature_dim * model.num_classes
        self.randomised = width > self.max_width
        return self.random_width if self.randomised else width

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator, and the fixed random map where the outer product is too wide."""
        Adversary.build(self, model)
        if self.randomised and self.random_map is None:
            self.random_map = RandomisedMap(model.feature_dim, model.num_classes, self.random_width, model.base_seed)

    def joint(self, features: Tensor, logits: Tensor) -> Tensor:
        """What the discriminator sees, from features ``[B, F]`` and logits ``[B, C]``."""
        probs = logits.detach().float().softmax(1)
        if self.randomised:
            return self.random_map(features, probs)
        return outer_product(features, probs)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The conditional domain objective."""
        source, target = (step.pooled("features"), step.pooled("logits")), (step.target.features, step.target.logits)
        weights: dict[str, Any] = {}
        if self.entropy:
            weights = {"source_weight": entropy_weights(source[1]), "target_weight": entropy_weights(target[1])}
        return {"domain": self.adversarial(step, self.joint(*source), self.joint(*target), **weights)}
