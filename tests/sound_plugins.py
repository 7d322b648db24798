"""Small plugins that are right, one for each way in which a plugin can act."""

from __future__ import annotations

import torch
from torch import nn

import uda
from uda.nn import Bank, EMATeacher


class WeighsOnly(uda.Plugin):
    """Gives the first objective half its weight."""

    @uda.hookimpl
    def weigh_objectives(self, step, objectives):
        return {next(iter(objectives)): 0.5}


class LabelsOnly(uda.Plugin):
    """Labels by the classifier."""

    @uda.hookimpl
    def pseudo_label(self, step):
        score, label = step.target.logits.softmax(1).max(1)
        return uda.PseudoLabels(label, weight=score)


class RejectsOnly(uda.Plugin):
    """Calls unsure samples unknown."""

    @uda.hookimpl
    def predict(self, batch):
        score, label = batch.logits.softmax(1).max(1)
        return uda.Prediction(label, score, unknown=score < score.mean())


class TransformsOnly(uda.Plugin):
    """Normalises the features."""

    @uda.hookimpl
    def transform_features(self, features):
        return 3 * nn.functional.normalize(features, dim=1)


class MixesOnly(uda.Plugin):
    """Adds noise to the source inputs."""

    @uda.hookimpl
    def prepare_batch(self, step):
        step.source.x = step.source.x + 0.5 * torch.randn_like(step.source.x)


class AdaptsOnly(uda.Plugin):
    """Moves the head's bias on each test batch."""

    @uda.hookimpl
    def adapt(self, model, batch):
        assert torch.is_grad_enabled()
        bias = model.head.linear.bias
        loss = uda.losses.mean_entropy(batch.features.detach() @ model.head.linear.weight.T + bias)
        (grad,) = torch.autograd.grad(loss, [bias])
        with torch.no_grad():
            bias -= grad
        return model.head(batch.features)


class SourceFree(uda.Plugin):
    """Entropy alone, without a source."""

    settings = ("source-free",)

    @uda.hookimpl
    def data_needs(self):
        return uda.DataNeeds(source=False)

    @uda.hookimpl
    def refine_classifier(self, step):
        return {"entropy": uda.losses.mean_entropy(step.target.logits)}


class TwoPhases(uda.Plugin):
    """Steps by hand, twice a batch."""

    manual = True

    @uda.hookimpl
    def optimise(self, step, objectives):
        step.model.manual_update(objectives["classification"], phase="first")
        logits = step.model.head(step.model.bottleneck(step.model.backbone(step.target.x)))
        step.model.manual_update(0.1 * uda.losses.mean_entropy(logits), only=["head"], phase="second")
        return True


class TeacherAndBank(uda.Plugin):
    """Consistency with an EMA teacher and with remembered features; views, a refresh and a held-out batch.

    Args:
        weight: of both objectives.
    """

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        self.weight = weight

    @uda.hookimpl
    def data_needs(self):
        return uda.DataNeeds(held_out=True, views={"weak", "strong"}, refresh={"target", "source"})

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "teacher"):
            self.teacher = EMATeacher([model.backbone, model.bottleneck, model.head])
            self.bank = Bank(model.sizes[model.target_name], features=model.feature_dim)
            self.register_buffer("centre", torch.zeros(model.feature_dim))

    @uda.hookimpl
    def refresh(self, bank):
        self.centre.copy_(bank.target.features.mean(0) - bank.source.features.mean(0))

    @uda.hookimpl
    def refine_classifier(self, step):
        with torch.no_grad():
            teacher = self.teacher(step.target.view("weak").x).float().softmax(1)
        remembered = self.bank.read("features", step.target.index)
        features = step.target.features.float()
        return {
            "teacher": self.weight
            * uda.losses.soft_cross_entropy(step.target.view("strong").logits, teacher),
            "memory": self.weight * (features - remembered + 0.1 * self.centre).square().mean(),
        }

    @uda.hookimpl
    def after_step(self, step):
        if step.updated:
            model = step.model
            self.teacher.update([model.backbone, model.bottleneck, model.head], 0.9)
        self.bank.write(step.target.index, features=step.target.features)


SOUND = [
    WeighsOnly, LabelsOnly, RejectsOnly, TransformsOnly, MixesOnly, AdaptsOnly, SourceFree, TwoPhases,
    TeacherAndBank,
]  # fmt: skip
