"""Maximum Classifier Discrepancy (Saito et al., CVPR 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.losses import classification_loss, log_mean_probs
from uda.nn import full, no_autocast, reverse_gradient
from uda.nn import ramp as ramp_factor
from uda_adversarial.two_classifiers import TwoClassifiers, groups_of


def classifier_discrepancy(logits: Tensor, other: Tensor) -> Tensor:
    """``mean_{b,c} |p1_bc - p2_bc|`` of two classifiers' softmax, from logits ``[B, C]``."""
    with no_autocast(logits):
        return (full(logits).softmax(1) - full(other).softmax(1)).abs().mean()


def class_balance(logits: Tensor) -> Tensor:
    """``-mean_c log mean_b p_bc``: small where all classes are used alike, from logits ``[B, C]``; least: log C."""
    return -log_mean_probs(logits).mean()


class MCD(TwoClassifiers):
    """Two classifiers disagree on the target as far as they can; the features bring them together.

    ``min_{F1,F2} CE(F1) + CE(F2) - weight * d`` and ``min_G weight * d`` with ``d = mean |p1 - p2|`` on the target
    (Saito et al. 2018, sections 3.2 and 3.3), both sides in one step: gradient reversal stands between features and
    classifiers for ``d``. :class:`MCDPhases` takes the three steps of the paper instead.

    Args:
        weight: of the discrepancy. Averaged over classes it shrinks with their number: re-implementations take 10 for
            31 and 30 for 65 classes.
        balance: weight of ``-mean_c log mean_b p``, which keeps all classes in use (not in the paper's equations; 0.01
            in re-implementations).
        reversal: coefficient of the gradient reversal; ``ramp``: its growth over the run's progress: ``none``,
            ``linear``, ``warm_start``.
        predict: ``main`` for the model's head, ``mean`` for the mean of both classifiers.
        head_hidden, layers, batch_norm, dropout: deep classifiers in the place of the model's head (the paper's are
            three layers with BatchNorm); 0 for two of the model's kind.
        lr_scale: learning rate of the second classifier relative to the head's.
    """

    search_space: ClassVar[dict[str, Any]] = {"weight": (0.3, 30.0, "log"), "ramp": ["none", "warm_start"]}

    def __init__(
        self,
        weight: float = 1.0,
        balance: float = 0.0,
        reversal: float = 1.0,
        ramp: str = "none",
        predict: str = "main",
        head_hidden: int = 0,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(head_hidden, layers, batch_norm, dropout, lr_scale)
        if min(weight, balance, reversal) < 0:
            raise uda.UDAError(f"{type(self).__name__}: weight, balance and reversal must not be negative.")
        check_choice(type(self).__name__, "predict", predict, ("main", "mean"))
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.balance, self.reversal, self.ramp = weight, balance, reversal, ramp
        self.by_both = predict == "mean"

    def discrepancy(self, model: uda.UDA, features: Tensor) -> Tensor:
        """Disagreement of both classifiers on features ``[B, F]``."""
        return classifier_discrepancy(model.head(features), self.second(features))

    def supervised(self, step: uda.Step, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        """What the second classifier learns of the source, and the balance of both on the target."""
        out = {"second": self.second_loss(step, source)}
        if self.balance:
            both = class_balance(step.model.head(target)) + class_balance(self.second(target))
            out["balance"] = self.balance * both
        return out

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Second classification, and the discrepancy behind the reversal."""
        source, target = step.pooled("features"), step.target.features
        coefficient = self.reversal * ramp_factor(self.ramp, step.progress)
        gap = self.discrepancy(step.model, reverse_gradient(target, coefficient))
        self.log_later(gap=gap.detach(), reversal=coefficient)
        return {**self.supervised(step, source, target), "discrepancy": -self.weight * gap}

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: uda.DomainBatch) -> uda.Prediction | None:
        """The mean of both classifiers, where that is wanted."""
        if not self.by_both:
            return None
        probs = (batch.logits.float().softmax(1) + self.second(batch.features).float().softmax(1)) / 2
        score, label = probs.max(1)
        return uda.Prediction(label, score)


class MCDPhases(MCD):
    """MCD in the three steps of the paper (Saito et al. 2018, section 3.3), each with a forward of its own.

    A: all on the source (and with whatever other plugins add, weighed where a plugin weighs objectives). B: the
    classifiers on the source and *for* discrepancy, features fixed. C, ``repeats`` times: the features against
    discrepancy, classifiers fixed. All steps share the model's optimiser, where the paper has one each for features and
    classifiers.

    Args:
        repeats: times of step C a batch, the paper's n (4).
        others: as in :class:`MCD`; ``reversal`` and ``ramp`` have no part here.
    """

    manual = True
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.3, 30.0, "log"), "repeats": [1, 2, 4]}

    def __init__(
        self,
        weight: float = 1.0,
        balance: float = 0.0,
        repeats: int = 4,
        predict: str = "main",
        head_hidden: int = 0,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, balance, 1.0, "none", predict, head_hidden, layers, batch_norm, dropout, lr_scale)
        if repeats < 1:
            raise uda.UDAError(f"MCDPhases: repeats must be 1 or more, got {repeats}.")
        self.repeats = repeats

    @uda.hookimpl
    def optimise(self, step: uda.Step, objectives: uda.Objectives) -> bool:
        """Steps A, B and C."""
        model = step.model
        step.objectives.pop(f"{self.key}/discrepancy")  # the next two steps are for it; a weigher weighs the others
        model.manual_update(model.total(step), phase="source")
        again = model.again(step, collect=False)
        with torch.no_grad():
            source, target = again.pooled("features"), again.target.features
        first = classification_loss(model.head(source), step.pooled("y"), model.label_smoothing)
        loss = first + sum(self.supervised(step, source, target).values())
        loss = loss - self.weight * self.discrepancy(model, target)
        model.manual_update(loss, only=groups_of(model, model.head, self.second), phase="classifiers")
        encoder = groups_of(model, model.backbone, model.bottleneck)
        for k in range(self.repeats):
            target = model.again(step, collect=False).target.features
            model.manual_update(self.weight * self.discrepancy(model, target), only=encoder, phase=f"features{k}")
        return True
