"""Balanced Adversarial Alignment and Adaptive Uncertainty Suppression (BA3US: Liang et al., ECCV 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from uda_adversarial.adversary import Adversary

import uda
from uda.losses import class_distributions, entropy_weights, mean_entropy
from uda.nn import full, no_autocast
from uda_partial.weights import ClassWeighted


def augmented_domain_loss(
    source_logit: Tensor, target_logit: Tensor, source_weight: Tensor, target_weight: Tensor, rows: int
) -> Tensor:
    """Domain loss in which the first ``rows`` source samples stand on the target's side as well.

    ``[(1 + m/B) (sum_s w l(1) + sum_{s<m} w l(0)) / (sum_s w + sum_{s<m} w) + sum_t w l(0) / sum_t w] / (2 + m/B)``,
    l the binary cross-entropy, m rows of B. With m = 0 it is the usual weighted loss.

    Args:
        source_logit, source_weight: ``[B]``; target_logit, target_weight: ``[Bt]``; weights are constants.
    """
    with no_autocast(source_logit):
        zs, zt = full(source_logit), full(target_logit)
        ws, wt = full(source_weight), full(target_weight)
        eps = torch.finfo(torch.float32).tiny
        extra = rows / max(len(zs), 1)
        source = (ws * F.softplus(-zs)).sum() + (ws[:rows] * F.softplus(zs[:rows])).sum()
        source = source / (ws.sum() + ws[:rows].sum()).clamp_min(eps)
        target = (wt * F.softplus(zt)).sum() / wt.sum().clamp_min(eps)
        return ((1 + extra) * source + target) / (2 + extra)


def complement_entropy(logits: Tensor, y: Tensor, weight: Tensor, alpha: float = 1.0) -> Tensor:
    """Negative entropy of the wrong classes, to be minimised: it spreads what a source sample leaves to them.

    ``sum_i v_i sum_{c != y} q_ic log q_ic / log(C - 1)`` with ``q_ic = p_ic / (1 - p_iy)`` and constant
    ``v_i ~ w_i (1 - p_iy)^alpha`` of sum 1 (Liang et al. 2020; weights as in the authors' code). Lies in [-1, 0].

    Args:
        logits: ``[B, C]``; y: class ids ``[B]`` or distributions ``[B, C]``, whose largest entry counts.
        weight: of each sample ``[B]``.
    """
    with no_autocast(logits):
        logits, y = full(logits), y if y.ndim == 1 else y.argmax(1)
        classes = logits.shape[1]
        if classes < 3:
            return 0.0 * logits.sum()  # one wrong class is all there is: nothing to spread
        wrong = ~class_distributions(y, classes, torch.bool)
        log_q = logits.masked_fill(~wrong, -torch.inf).log_softmax(1).masked_fill(~wrong, 0.0)
        negative = (log_q.exp() * log_q * wrong).sum(1) / math.log(classes - 1)
        doubt = (1 - logits.softmax(1).gather(1, y[:, None])[:, 0]).clamp_min(0) ** alpha
        v = (full(weight) * doubt).detach()
        return (v * negative).sum() / v.sum().clamp_min(torch.finfo(torch.float32).tiny)


class BA3US(ClassWeighted, Adversary):
    """Class-weighted DANN that lends source samples to the target's side, and flattens what is said of wrong classes.

    Weighted classification as in PADA; ``weight`` times :func:`augmented_domain_loss`, whose weights are the class
    weights (source) times ``1 + exp(-H)``; ``complement_weight`` times :func:`complement_entropy` of the source;
    ``entropy_weight`` times the target's mean entropy (Liang et al. 2020). The lent samples balance label sets of
    different size, and their share shrinks to zero over the run. They are rows of the step's own source batch, which
    in expectation equals batches of their own.

    Args:
        lent: share of the source batch that is lent at the start of the run (the paper: 1/4).
        complement_weight: published: 1 on Office-Home, 5 on Office-31 and ImageNet-Caltech.
        entropy_weight: published: 0.1.
        certainty: weigh samples by ``1 + exp(-H)`` in the domain loss, as CDAN+E does.
        alpha: exponent of a sample's doubt in its weight in the complement objective.
        temperature, normalise, warmup, every, mean: as in :class:`~uda_partial.weights.ClassWeights`.
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    settings = ClassWeighted.settings
    search_space: ClassVar[dict[str, Any]] = {
        **Adversary.search_space, "complement_weight": [1.0, 5.0], "entropy_weight": (0.01, 0.3, "log"),
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        lent: float = 0.25,
        complement_weight: float = 1.0,
        entropy_weight: float = 0.1,
        certainty: bool = True,
        alpha: float = 1.0,
        temperature: float = 1.0,
        normalise: str = "sum",
        warmup: float = 0.1,
        every: int = 0,
        mean: str = "weighted",
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = False,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        Adversary.__init__(self, weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        if min(complement_weight, entropy_weight, alpha) < 0 or not 0 <= lent <= 1:
            raise uda.UDAError("BA3US: weights and alpha must not be negative, and lent is a share in [0, 1].")
        self.set_estimate(temperature, normalise, warmup, every, mean)
        self.lent, self.complement_weight, self.entropy_weight = lent, complement_weight, entropy_weight
        self.certainty, self.alpha = certainty, alpha

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator and class weights."""
        Adversary.build(self, model)
        self.make_estimate(model.num_classes)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The augmented domain objective."""
        source, target = step.pooled("features"), step.target.features
        source_weight = self.sample_weight(step.pooled("y"))
        target_weight = torch.ones(len(target), device=target.device)
        if self.certainty:
            source_weight = source_weight * entropy_weights(step.pooled("logits"), normalise="none")
            target_weight = entropy_weights(step.target.logits, normalise="none")
        rows = int(self.lent * (1 - step.progress) * len(source))
        logits = self.domain_logits(step, source, target)
        return {"domain": self.weight * augmented_domain_loss(*logits, source_weight, target_weight, rows)}

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Certain on the target, undecided between wrong classes on the source."""
        out = {}
        if self.complement_weight:
            y = step.pooled("y")
            value = complement_entropy(step.pooled("logits"), y, self.sample_weight(y), self.alpha)
            out["complement"] = self.complement_weight * value
        if self.entropy_weight:
            out["entropy"] = self.entropy_weight * mean_entropy(step.target.logits)
        return out
