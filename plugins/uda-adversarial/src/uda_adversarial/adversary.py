"""What domain-adversarial methods share: a discriminator behind gradient reversal with a warm start."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.losses import domain_adversarial_loss
from uda.nn import DomainDiscriminator, reverse_gradient, warm_start


class Adversary(uda.Plugin):
    """Discriminator, gradient reversal and warm start; a subclass says what the discriminator sees.

    Args:
        weight: weight of the adversarial objective in the sum; it scales the discriminator's gradient as well.
        gamma: steepness of the reversal's warm start ``2 / (1 + exp(-gamma p)) - 1`` over the run's progress p
            (Ganin et al. 2016, section 5.2.2).
        reversal: final coefficient of the gradient reversal, which scales only what reaches the features.
        hidden, layers, batch_norm, dropout: the discriminator, ``layers`` hidden layers of width ``hidden``.
        lr_scale: learning rate of the discriminator relative to the head's.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 3.0, "log"), "gamma": [1.0, 3.0, 10.0], "hidden": [64, 256, 1024],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if weight < 0 or reversal < 0:
            raise uda.UDAError(f"{type(self).__name__}: weight and reversal must not be negative.")
        self.weight, self.gamma, self.reversal, self.lr_scale = weight, gamma, reversal, lr_scale
        self._net = {"hidden": hidden, "layers": layers, "batch_norm": batch_norm, "dropout": dropout}
        self.discriminator: DomainDiscriminator | None = None

    def input_size(self, model: uda.UDA) -> int:
        """Width of what the discriminator sees: the features, unless a method says otherwise."""
        return model.feature_dim

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Make the discriminator for the model's feature width."""
        if self.discriminator is None:
            self.discriminator = DomainDiscriminator(self.input_size(model), **self._net)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The discriminator at its own rate."""
        return [{"name": self.key, "params": self.discriminator.parameters(), "lr_scale": self.lr_scale}]

    def domain_logits(self, step: uda.Step, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[Bs]``, ``[Bt]`` of the discriminator behind the reversal: ``source [Bs, D]``, ``target [Bt, D]``.

        One forward over both, so that its normalisation sees both domains.
        """
        coefficient = self.reversal * warm_start(step.progress, self.gamma)
        logits = self.discriminator(reverse_gradient(torch.cat([source, target]), coefficient)).squeeze(1)
        source_logit, target_logit = logits.split([len(source), len(target)])
        self.log_later(
            domain_accuracy=lambda: ((source_logit > 0).float().mean() + (target_logit <= 0).float().mean()) / 2,
            reversal=coefficient,
        )
        return source_logit, target_logit

    def adversarial(
        self,
        step: uda.Step,
        source: Tensor,
        target: Tensor,
        source_weight: Tensor | None = None,
        target_weight: Tensor | None = None,
        mean: str = "weighted",
    ) -> Tensor:
        """Discriminate ``source`` ``[Bs, D]`` (label 1) from ``target`` ``[Bt, D]`` (label 0) behind the reversal.

        Weights ``[Bs]``, ``[Bt]`` and ``mean`` as in :func:`~uda.losses.domain_adversarial_loss`.
        """
        logits = self.domain_logits(step, source, target)
        return self.weight * domain_adversarial_loss(*logits, source_weight, target_weight, mean)
