"""Universal adaptation network (UAN: You et al., CVPR 2019)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from uda_adversarial.adversary import Adversary

import uda
from uda.losses import domain_adversarial_loss
from uda.nn import DomainDiscriminator, full, no_autocast
from uda.passes import target_now
from uda.rejection import known_limit, normalised_entropy, otsu
from uda_universal.common import SETTINGS, marked, unit_range


def transferability(domain_logit: Tensor, logits: Tensor) -> Tensor:
    """``d' - H(p) / log C`` ``[B]`` in [-1, 1]: like the source and sure (equation 8); its negative for the source.

    Args:
        domain_logit: of the domain classifier without adversary ``[B]``, source positive; logits: ``[B, C]``.
    """
    with no_autocast(logits):
        return full(domain_logit).sigmoid() - normalised_entropy(logits)


def normalised(weight: Tensor) -> Tensor:
    """To [0, 1] by least and largest, then to mean 1 over the batch ``[B]``; ones where all are alike."""
    weight = unit_range(weight)
    mean = weight.mean()
    return torch.where(mean > 0, weight / mean.clamp_min(1e-12), torch.ones_like(weight))


class UAN(Adversary):
    """DANN whose samples count by how much they seem to be of a class that both domains have.

    A second domain classifier d', trained on constant features, tells how like the source a sample is. Weights:
    ``w_s = H(p_s) / log C - d'`` and ``w_t = d' - H(p_t) / log C``, constants, normalised over the batch. Inference:
    unknown where ``w_t`` is below a threshold.

    Args:
        threshold: w_0; the authors' code has -0.5 everywhere. None: where the target's own ``w_t`` fall into two groups
            (:func:`uda.rejection.otsu`), taken anew in each evaluation.
        temperature: of the source's softmax in its entropy, 10 in the authors' code, since the classifier is sure of
            all source samples.
        others: as in :class:`~uda_adversarial.adversary.Adversary`; both domain classifiers have this shape.
    """

    settings = SETTINGS
    limit: Tensor
    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "temperature": [1.0, 3.0, 10.0]}

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float | None = -0.5,
        temperature: float = 10.0,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = False,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        if (threshold is not None and not -1 <= threshold <= 1) or temperature <= 0:
            raise uda.UDAError("UAN: threshold lies in [-1, 1], and temperature must be positive.")
        self.threshold, self.temperature = threshold, temperature
        self.judge: DomainDiscriminator | None = None
        self.register_buffer("limit", torch.tensor(math.nan if threshold is None else -threshold))

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Both domain classifiers."""
        super().build(model)
        if self.judge is None:
            self.judge = DomainDiscriminator(model.feature_dim, **self._net)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """Both domain classifiers at their own rate."""
        both = [*self.discriminator.parameters(), *self.judge.parameters()]
        return [{"name": self.key, "params": both, "lr_scale": self.lr_scale}]

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The weighted adversary, and the domain classifier that the weights are of."""
        source, target = step.pooled("features"), step.target.features
        judged = self.judge(torch.cat([source, target]).detach()).squeeze(1)
        at_source, at_target = judged.split([len(source), len(target)])
        w_s = normalised(-transferability(at_source, step.pooled("logits") / self.temperature).detach())
        w_t = normalised(transferability(at_target, step.target.logits).detach())
        return {
            "domain": self.adversarial(step, source, target, w_s, w_t),
            "judge": domain_adversarial_loss(at_source, at_target),
        }

    def strangeness(self, features: Tensor, logits: Tensor) -> Tensor:
        """The negative transferability ``[B]`` of ``[B, F]`` and ``[B, C]``."""
        with no_autocast(features):
            return -transferability(self.judge(full(features)).squeeze(1), logits)

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """Without a threshold, where the target falls into two groups now."""
        pool = target_now(model) if self.threshold is None else None
        if pool is not None:
            self.limit.fill_(otsu(self.strangeness(pool.features, pool.logits)))

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: uda.DomainBatch, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown where the transferability is small."""
        if self.threshold is not None:  # a checkpoint's limit is of its own threshold
            return marked(batch, prediction, self.strangeness(batch.features, batch.logits), -self.threshold)
        limit = known_limit(model, self.limit, "UAN: the cut of the target")
        return marked(batch, prediction, self.strangeness(batch.features, batch.logits), limit)
