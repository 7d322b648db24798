"""Mean teacher (Tarvainen & Valpola, NeurIPS 2017) between domains (French et al., ICLR 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.errors import check_choice
from uda.nn import EMATeacher, domain_context, full, no_autocast
from uda_selftraining.pseudo_label import VIEWS, confident_labels

EPSILON = 1e-6  # inside the logarithms of probabilities, as French et al.


def binary_cross_entropy(probs: Tensor, target: Tensor | float) -> Tensor:
    """``-t log(p + e) - (1 - t) log(1 - p + e)``, entry by entry."""
    return -(target * (probs + EPSILON).log() + (1 - target) * (1 - probs + EPSILON).log())


def consistency_loss(student: Tensor, teacher: Tensor, keep: Tensor | None = None, loss: str = "mse") -> Tensor:
    """Distance of the two networks' predictions, mean over classes and over the batch.

    ``1/B sum_i m_i 1/C sum_c (s_ic - t_ic)^2``, or with ``loss="bce"`` the binary cross-entropy in the place of the
    square. A sample that is not kept counts as zero.

    Args:
        student: class probabilities ``[B, C]``; teacher: ``[B, C]``, a constant.
        keep: mask ``[B]``, or None for all.
    """
    teacher = teacher.detach()
    each = (student - teacher).square() if loss == "mse" else binary_cross_entropy(student, teacher)
    each = each.mean(1)
    return (each if keep is None else each * keep.to(each.dtype)).mean()


def class_balance_loss(student: Tensor) -> Tensor:
    """``sum_c BCE(mean_i s_ic, 1 / C)``: all classes shall be predicted equally often (French et al. 2018).

    Args:
        student: class probabilities ``[B, C]``.
    """
    return binary_cross_entropy(student.mean(0), 1 / student.shape[1]).sum()


@contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm inside normalises by the batch, and keeps running averages of it."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    for m in norms:
        m.training = True
    try:
        yield
    finally:
        for m in norms:
            m.training = False


class MeanTeacher(uda.Plugin):
    """Agree with a teacher that is the student's own moving average (Tarvainen & Valpola 2017; French et al. 2018).

    The teacher sees one view of a target sample and the student another. Samples of which the teacher is sure give the
    consistency objective, and the batch gives the class balance, which is scaled by the share of sure samples:
    ``weight * (consistency + balance * kept * class_balance)``. The teacher follows by
    ``theta' = momentum * theta' + (1 - momentum) * theta``, and starts as a copy of the student.

    Args:
        weight: of both objectives together (French et al.: 3 for small images).
        momentum: of the teacher (0.99).
        threshold: smallest probability of a teacher's prediction that counts (French et al.: 0.968; 0: all).
        balance: weight of the class balance beside the consistency (0.005; 0: none).
        loss: ``mse`` (both papers) or ``bce``, distance of the probabilities.
        ramp_up: share of the training in which the weight grows as ``exp(-5 (1 - t)^2)`` (Tarvainen & Valpola; French
            et al. have either this or the threshold). 0: none.
        warm_momentum: in the n-th step the momentum is at most ``1 - 1 / (n + 1)``, so that the teacher is soon rid of
            the initial weights (Tarvainen & Valpola).
        student_view: what the student sees, ``strong``, ``weak`` or ``x``.
        teacher_view: what the teacher sees. French et al. draw both from one family of augmentations.
        statistics: of the teacher's BatchNorm in training: ``batch``: those of the target batch (French et al.; its
            running averages are then of the target alone); ``student``: the student's running averages; ``average``:
            moving averages of these.
        labels: the teacher's sure predictions are pseudo-labels for other plugins, too.
        predict: who predicts in inference, ``student`` or ``teacher``. Label-free scores see the student's logits.
    """

    settings = ("closed", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.3, 30.0, "log"), "momentum": [0.9, 0.99, 0.999], "threshold": [0.0, 0.8, 0.9, 0.968],
        "balance": [0.0, 0.005, 0.05],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 3.0,
        momentum: float = 0.99,
        threshold: float = 0.968,
        balance: float = 0.005,
        loss: str = "mse",
        ramp_up: float = 0.0,
        warm_momentum: bool = False,
        student_view: str = "strong",
        teacher_view: str = "weak",
        statistics: str = "batch",
        labels: bool = False,
        predict: str = "student",
    ) -> None:
        super().__init__()
        if weight < 0 or balance < 0 or not 0 <= threshold < 1 or not 0 <= momentum <= 1 or not 0 <= ramp_up <= 1:
            raise uda.UDAError(
                "MeanTeacher: weight and balance must not be negative, threshold is in [0, 1), momentum and ramp_up "
                "are in [0, 1]."
            )
        for name, value, known in (
            ("student_view", student_view, VIEWS),
            ("teacher_view", teacher_view, VIEWS),
            ("loss", loss, ("mse", "bce")),
            ("statistics", statistics, ("batch", "student", "average")),
            ("predict", predict, ("student", "teacher")),
        ):
            check_choice("MeanTeacher", name, value, known)
        self.weight, self.momentum, self.threshold, self.balance = weight, momentum, threshold, balance
        self.loss, self.ramp_up, self.warm_momentum = loss, ramp_up, warm_momentum
        self.student_view, self.teacher_view, self.statistics = student_view, teacher_view, statistics
        self.labels, self.who_predicts = labels, predict
        self.teacher: EMATeacher | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The views of student and teacher."""
        return uda.DataNeeds(views={self.student_view, self.teacher_view} - {"x"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The teacher."""
        if self.teacher is None:
            buffers = {"batch": "none", "student": "copy", "average": "average"}[self.statistics]
            self.teacher = EMATeacher(self._student(model), buffers)

    @staticmethod
    def _student(model: uda.UDA) -> list[nn.Module]:
        return [model.backbone, model.bottleneck, model.head]

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Before the first step the teacher takes the student's weights, which may come from a checkpoint."""
        if step.index == 0:
            for copy, module in zip(self.teacher.copies, self._student(step.model), strict=True):
                copy.load_state_dict(module.state_dict())

    def teacher_logits(self, model: uda.UDA, batch: uda.DomainBatch, view: str = "x", training: bool = True) -> Tensor:
        """The teacher's logits ``[B, C]`` for a view of a batch, without gradient."""
        backbone, bottleneck, head = self.teacher.copies
        with torch.no_grad(), domain_context(batch.name, batch.role):
            x = batch.view(view).x
            if training and self.statistics == "batch":
                with batch_statistics(self.teacher):
                    features = bottleneck(backbone(x))
            else:
                features = bottleneck(backbone(x))
            # a batch of its own, so that no cache of the student is overwritten
            shadow = uda.DomainBatch(model, batch.name, batch.role, {"x": x, "index": batch.index})
            return head(
                model.hooks.chain("transform_features", "features", model=model, batch=shadow, features=features)
            )

    def _of_step(self, step: uda.Step) -> Tensor:
        name = f"{self.key}.teacher"
        if name not in step.cache:
            step.cache[name] = self.teacher_logits(step.model, step.target, self.teacher_view)
        return step.cache[name]

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels | None:
        """The teacher's labels, where these are wanted."""
        return confident_labels(self._of_step(step), self.threshold, soft=False) if self.labels else None

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Consistency and class balance."""
        logits, teacher = step.target.view(self.student_view).logits, self._of_step(step)
        weight = self.weight
        if self.ramp_up:
            weight *= math.exp(-5 * (1 - min(1.0, step.progress / self.ramp_up)) ** 2)
        with no_autocast(logits):
            student, teacher = full(logits).softmax(1), full(teacher).softmax(1)
            keep = teacher.max(1).values > self.threshold
            self.log_later(kept=lambda: keep.float().mean())
            out = {"consistency": weight * consistency_loss(student, teacher, keep, self.loss)}
            if self.balance:
                balance = class_balance_loss(student) * keep.to(student.dtype).mean()
                out["balance"] = weight * self.balance * balance
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """The teacher follows."""
        if step.updated:
            momentum = min(self.momentum, 1 - 1 / (step.index + 1)) if self.warm_momentum else self.momentum
            self.teacher.update(self._student(step.model), momentum)

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: uda.DomainBatch) -> uda.Prediction | None:
        """The teacher's prediction, where that is wanted."""
        if self.who_predicts != "teacher":
            return None
        score, label = self.teacher_logits(model, batch, training=False).float().softmax(1).max(1)
        return uda.Prediction(label, score)
