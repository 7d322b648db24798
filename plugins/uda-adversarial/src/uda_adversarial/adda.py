"""Adversarial Discriminative Domain Adaptation (Tzeng et al., CVPR 2017)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

import uda
from uda.losses import domain_adversarial_loss
from uda.nn import EMATeacher, domain_context
from uda_adversarial.adversary import Adversary


class ADDA(Adversary):
    """A copy of the source encoder learns to map the target to where the source's features are.

    One run holds both stages. In its first share ``pretrain`` backbone, bottleneck and head train on the source alone.
    Then a copy of backbone and bottleneck is kept, frozen and in evaluation mode, for the source; the head is frozen;
    and the model's own backbone and bottleneck become the target encoder, which sees the target alone and is trained
    against a discriminator with inverted labels (Tzeng et al. 2017, section 4):

    ``min_D 1/2 [BCE(D(F_s(x_s)), 1) + BCE(D(F_t(x_t)), 0)]`` and ``min_{F_t} weight * BCE(D(F_t(x_t)), 1)``

    Both take their gradients at the same weights, in one step of the optimiser. Prediction is head(F_t(x)). In the
    second stage the source's features and logits are constants, and nothing keeps F_t from drifting but its start: the
    published rates are small. List ADDA after plugins that change inputs or layers.

    Args:
        weight: of the target encoder's objective.
        pretrain: share of the run that trains on the source alone.
        inverted: the target encoder's objective has inverted labels (the paper); else it is the negative of the
            discriminator's (gradient reversal, as in re-implementations), for which ``reversal`` is the coefficient.
        reversal: coefficient of the second form, constant (re-implementations: up to 2).
        hidden, layers, batch_norm, dropout: the discriminator (500, 2, no BatchNorm: the paper's for digits).
        lr_scale: learning rate of the discriminator relative to the head's.
    """

    settings = ("closed", "multi-source")
    unused_parameters = True  # discriminator and head take turns
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.03, 1.0, "log"), "pretrain": [0.3, 0.5], "hidden": [64, 256, 1024],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        pretrain: float = 0.3,
        inverted: bool = True,
        reversal: float = 1.0,
        hidden: int = 500,
        layers: int = 2,
        batch_norm: bool = False,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, 0.0, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        if not 0 <= pretrain < 1:
            raise uda.UDAError(f"ADDA: pretrain is a share of the run in [0, 1), got {pretrain}.")
        self.pretrain, self.inverted = pretrain, inverted
        self.source_encoder: EMATeacher | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator, and room for the frozen source encoder."""
        Adversary.build(self, model)
        if self.source_encoder is None:
            self.source_encoder = EMATeacher([model.backbone, model.bottleneck])
            self.register_buffer("adapting", torch.zeros((), dtype=torch.bool))

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """From the second stage on, the model's encoder sees the target alone."""
        if step.progress < self.pretrain:
            return
        model = step.model
        if not self.adapting:
            self.source_encoder.update([model.backbone, model.bottleneck], momentum=0.0)
            self.adapting.fill_(True)
        for batch in step.sources.values():  # so no source in the target encoder's statistics, and a frozen head
            with torch.no_grad(), domain_context(batch.name, "source"):
                batch.features = model.hooks.chain(
                    "transform_features", "features", model=model, batch=batch, features=self.source_encoder(batch.x)
                )
                batch.views["x"].set_logits(model.head(batch.features))
        step.cache[f"{self.key}/adapting"] = True

    def target_loss(self, target: Tensor) -> Tensor:
        """What the target encoder minimises; the discriminator is a constant here."""
        frozen = {k: v.detach() for k, v in self.discriminator.state_dict(keep_vars=True).items()}
        logit = functional_call(self.discriminator, frozen, (target,))
        away = torch.nn.functional.binary_cross_entropy_with_logits
        if self.inverted:
            return away(logit.float(), torch.ones_like(logit, dtype=torch.float32))
        return -self.reversal * away(logit.float(), torch.zeros_like(logit, dtype=torch.float32)) / 2

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Nothing in the first stage; both sides of the game in the second."""
        if f"{self.key}/adapting" not in step.cache:
            return {}
        source, target = step.pooled("features"), step.target.features
        logits = self.discriminator(torch.cat([source, target.detach()])).squeeze(1)
        source_logit, target_logit = logits.split([len(source), len(target)])
        self.log_later(
            domain_accuracy=lambda: ((source_logit > 0).float().mean() + (target_logit <= 0).float().mean()) / 2
        )
        return {
            "discriminator": domain_adversarial_loss(source_logit, target_logit),
            "target": self.weight * self.target_loss(target),
        }
