"""Calibrated multiple uncertainties for open class detection (CMU: Fu et al., ECCV 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from uda_adversarial.adversary import Adversary

import uda
from uda.losses import class_distributions, soft_cross_entropy
from uda.nn import full, no_autocast
from uda.passes import target_now
from uda_universal.common import SETTINGS, marked, unit_range


def uncertainties(logits: Tensor) -> Tensor:
    """Entropy, disagreement and doubt of an ensemble ``[B, 3]`` (equations 2 to 4).

    Mean entropy of its members; standard deviation over members, mean over classes; one minus the mean confidence.

    Args:
        logits: ``[m, B, C]``.
    """
    with no_autocast(logits):
        log_p = full(logits).log_softmax(2)
        p = log_p.exp()
        return torch.stack([-(p * log_p).sum(2).mean(0), p.std(0).mean(1), 1 - p.amax(2).mean(0)], 1)


def certainty(measures: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``w = 1 - mean`` of the three, each brought to [0, 1] by its range over the target ``[B]`` (equation 5).

    Args:
        measures: ``[B, 3]``; low, high: ``[3]``.
    """
    return 1 - ((measures - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).mean(1)


class Ensemble(nn.Module):
    """``[B, F] -> [m, B, C]``: linear classifiers that start from different distributions, as in the authors' code."""

    def __init__(self, in_features: int, num_classes: int, members: int) -> None:
        super().__init__()
        init = nn.init
        starts = (
            lambda w: init.kaiming_uniform_(w, a=math.sqrt(5)), init.xavier_uniform_, init.xavier_normal_,
            init.kaiming_uniform_, init.kaiming_normal_,
        )  # fmt: skip
        weight = torch.empty(members, num_classes, in_features)
        for i in range(members):
            starts[i % len(starts)](weight[i])
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(members, 1, num_classes))

    def forward(self, features: Tensor) -> Tensor:
        """Logits of all members."""
        return features.to(self.weight.dtype) @ self.weight.transpose(1, 2) + self.bias


class CMU(Adversary):
    """DANN whose samples count by the certainty of an ensemble, which tells unknown classes as well.

    ``weight * 1/2 [mean_s w_s BCE(D(f_s), 1) + mean_t w_t BCE(D(f_t), 0)]``: a domain of small weights counts less.
    ``w_t`` is :func:`certainty` of the :func:`uncertainties` of ``members`` linear classifiers on constant features;
    ``w_s`` of a class its mean probability over target samples with ``w_t >= threshold``, brought to [0, 1]. Ranges
    and class weights come from the whole target at the start of each epoch; an evaluation takes its own ranges.
    Inference: unknown where ``w_t < threshold``. The members learn from different random halves of a batch.

    Args:
        threshold: w_0; the authors' later code has 0.5, the earlier one a value chosen for each data set.
        members: m.
        share: of a batch that each member learns from.
        view: of the source that the members see: ``x``, or the augmented ``weak`` or ``strong``, as published.
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "members": [3, 5, 7]}
    class_weight: Tensor
    ranges: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        threshold: float = 0.5,
        members: int = 5,
        share: float = 0.5,
        view: str = "x",
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        if not 0 <= threshold <= 1 or members < 2 or not 0 < share <= 1:
            raise uda.UDAError("CMU: threshold and share lie in [0, 1], and members are 2 or more.")
        uda.errors.check_choice("CMU", "view", view, ("x", "weak", "strong"))
        self.threshold, self.members, self.share, self.view = threshold, members, share, view
        self.ensemble: Ensemble | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains, and the whole target at the start of each epoch."""
        return uda.DataNeeds(refresh={"target"}, source_views=set() if self.view == "x" else {self.view})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Discriminator, ensemble, class weights, and ranges for training and for evaluation."""
        super().build(model)
        if self.ensemble is None:
            classes = model.num_classes
            self.ensemble = Ensemble(model.feature_dim, classes, self.members)
            self.register_buffer("class_weight", torch.ones(classes))
            whole = torch.tensor([[0.0, 0.0, 0.0], [math.log(max(classes, 2)), 0.5, 1.0]])
            self.register_buffer("ranges", whole.repeat(2, 1, 1))

    @torch.no_grad()
    def measured(self, features: Tensor) -> Tensor:
        """The three measures ``[B, 3]``."""
        with no_autocast(features):
            return uncertainties(self.ensemble(full(features)))

    def look(self, features: Tensor, place: int) -> Tensor:
        """Take the ranges of the measures, and return the certainties ``[N]``."""
        found = self.measured(features)
        self.ranges[place].copy_(torch.stack([found.amin(0), found.amax(0)]))
        return certainty(found, *self.ranges[place])

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Ranges and class weights."""
        sure = (self.look(bank.target.features, 0) >= self.threshold).to(bank.target.logits.dtype)
        mean = sure @ bank.target.logits.softmax(1) / sure.sum().clamp_min(1)
        self.class_weight.copy_(unit_range(mean) if sure.any() and mean.amax() > mean.amin() else torch.ones_like(mean))

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """Ranges over the target as it is seen now."""
        pool = target_now(model)
        if pool is not None:
            self.look(pool.features, 1)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The weighted adversary."""
        w_t = certainty(self.measured(step.target.features), *self.ranges[0])
        w_s = class_distributions(step.pooled("y"), len(self.class_weight)) @ self.class_weight
        self.log_later(certainty=w_t.mean())
        return {"domain": self.adversarial(step, step.pooled("features"), step.target.features, w_s, w_t, "batch")}

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The members learn the source, each from its own draw of the batch; the features are constants."""
        features = torch.cat([b.view(self.view).features for b in step.sources.values()]).detach()
        logits, y = self.ensemble(full(features)), step.pooled("y")
        y = class_distributions(y, logits.shape[2])
        loss = torch.stack([soft_cross_entropy(z, y, reduction="none") for z in logits])
        keep = (torch.rand(loss.shape, device=loss.device) <= self.share).to(loss.dtype)
        return {"ensemble": ((keep * loss).sum(1) / keep.sum(1).clamp_min(1)).sum()}

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: uda.DomainBatch, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown where the ensemble is unsure."""
        doubt = 1 - certainty(self.measured(batch.features), *self.ranges[1])
        return marked(batch, prediction, doubt, 1 - self.threshold)
