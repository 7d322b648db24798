"""Plugins that are wrong in one way each; the testing kit must catch each by the check meant for it."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn

import uda


def gap(step: uda.Step) -> Tensor:
    """A sound objective."""
    return (step.pooled("features").float().mean(0) - step.target.features.float().mean(0)).square().sum()


class Constant(uda.Plugin):
    """Its loss has no gradient."""

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": torch.tensor(1.5)}


class Zero(uda.Plugin):
    """Its loss is zero, with a graph."""

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": gap(step), "nothing": 0.0 * step.target.features.sum()}


class Detached(uda.Plugin):
    """Its features are detached."""

    @uda.hookimpl
    def align_features(self, step):
        return {
            "gap": (step.source.features.detach().mean(0) - step.target.features.detach().mean(0))
            .square()
            .sum()
        }


class OwnOnly(uda.Plugin):
    """It trains a discriminator on detached features and nothing else."""

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "net"):
            self.net = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def align_features(self, step):
        return {"domain": nn.functional.softplus(self.net(step.target.features.detach())).mean()}


class Silent(uda.Plugin):
    """Its condition never holds."""

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": gap(step)} if step.progress > 2 else None


class Identical(uda.Plugin):
    """It predicts what the softmax predicts."""

    @uda.hookimpl
    def predict(self, batch):
        score, label = batch.logits.softmax(1).max(1)
        return uda.Prediction(label, score)


class PlainCounter(uda.Plugin):
    """Its ramp counts steps in a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": (1 + self.count) * gap(step)}

    @uda.hookimpl
    def after_step(self):
        self.count += 1


class OwnGenerator(uda.Plugin):
    """It draws from a generator whose state no checkpoint holds."""

    @uda.hookimpl
    def build(self):
        if "random" not in vars(self):
            self.random = np.random.default_rng(0)

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": float(self.random.random()) * gap(step)}


class Unseeded(uda.Plugin):
    """It draws from a generator that no seed fixes."""

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": random.SystemRandom().random() * gap(step)}


class LambdaAttribute(uda.Plugin):
    """It cannot be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = lambda x: 2 * x

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": self.scale(gap(step))}


class BuiltTwice(uda.Plugin):
    """It makes a new head at each build."""

    @uda.hookimpl
    def build(self, model):
        self.net = nn.Linear(model.feature_dim, model.feature_dim)

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": self.net(step.target.features).square().mean()}


class Grown(uda.Plugin):
    """Its buffer grows with what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 8))

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": gap(step)}

    @uda.hookimpl
    def after_step(self, step):
        self.memory = torch.cat([self.memory, step.target.features.float()])


class PlainTensor(uda.Plugin):
    """It predicts with a tensor that is no buffer."""

    bias: Tensor | None = None

    @uda.hookimpl
    def after_step(self, step):
        self.bias = step.target.logits.float().mean(0)

    @uda.hookimpl
    def predict(self, batch):
        logits = batch.logits if self.bias is None else batch.logits - self.bias
        score, label = logits.softmax(1).max(1)
        return uda.Prediction(label, score)


class Peeks(uda.Plugin):
    """It takes the target labels from the data module."""

    @uda.hookimpl
    def refine_classifier(self, step):
        pools = step.model.trainer.datamodule.task.target
        y = pools.train.labels[step.target.index]
        return {"cheat": nn.functional.cross_entropy(step.target.logits, y)}


class SetsThreads(uda.Plugin):
    """It changes a switch of torch."""

    @uda.hookimpl
    def align_features(self, step):
        torch.set_float32_matmul_precision("high")
        return {"gap": gap(step)}


class TouchesTrainer(uda.Plugin):
    """It changes the trainer."""

    @uda.hookimpl
    def align_features(self, step):
        step.model.trainer.log_every_n_steps = 1
        return {"gap": gap(step)}


class Cancels(uda.Plugin):
    """A variance as a difference of large numbers, in whatever precision the logits have."""

    @uda.hookimpl
    def align_features(self, step):
        z = step.target.logits + 300
        return {"variance": z.square().mean() - z.mean().square()}


class WritesHalf(uda.Plugin):
    """It writes half-precision rows into a float32 buffer by index."""

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "memory"):
            self.register_buffer("memory", torch.zeros(model.sizes[model.target_name], model.num_classes))

    @uda.hookimpl
    def align_features(self, step):
        return {"consistency": (step.target.logits - self.memory[step.target.index]).square().mean()}

    @uda.hookimpl
    def after_step(self, step):
        self.memory[step.target.index] = step.target.logits


class StepsByItself(uda.Plugin):
    """Manual optimisation without clipping or accumulation."""

    manual = True

    @uda.hookimpl
    def optimise(self, step, objectives):
        optimizer = step.model.optimizers()
        optimizer.zero_grad()
        loss = sum(objectives.values()) + 0.3 * uda.losses.mean_entropy(step.target.logits)
        loss.backward()
        optimizer.step()
        step.updated = True
        return True


class TakesModule(uda.Plugin):
    """Its argument is no plain value."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": self.net(step.target.features).square().mean()}


class NoHook(uda.Plugin):
    """It marks no method."""

    def align_features(self, step):
        return {"gap": gap(step)}


class Misspelt(uda.Plugin):
    """Its hook does not exist."""

    @uda.hookimpl
    def aling_features(self, step):
        return {"gap": gap(step)}


class WrongShape(uda.Plugin):
    """It predicts class scores instead of class ids."""

    @uda.hookimpl
    def predict(self, batch):
        return uda.Prediction(batch.logits.softmax(1), batch.logits.softmax(1))


class Undocumented(uda.Plugin):
    """Says nothing of its argument."""

    def __init__(self, strength: float = 1.0) -> None:
        super().__init__()
        self.strength = strength

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": self.strength * gap(step)}


class LocalBank(uda.Plugin):
    """It writes a memory from this process's samples alone."""

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "memory"):
            self.register_buffer("memory", torch.zeros(model.sizes[model.target_name], model.feature_dim))

    @uda.hookimpl
    def align_features(self, step):
        old = self.memory[step.target.index]
        return {"consistency": (step.target.features.float() - old).square().mean()}

    @uda.hookimpl
    def after_step(self, step):
        self.memory[step.target.index] = step.target.features.float()


class UnusedHead(uda.Plugin):
    """It has a head that takes part in no objective."""

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "net"):
            self.net = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": gap(step)}


class WaitsForEver(uda.Plugin):
    """Only the first process takes part in a collective operation."""

    @uda.hookimpl
    def align_features(self, step):
        return {"gap": gap(step)}

    @uda.hookimpl
    def after_step(self, step):
        if step.model.global_rank == 0:
            uda.nn.gather_rows(step.target.features)


BROKEN = {
    Constant: "liveness", Zero: "liveness", Detached: "liveness", OwnOnly: "liveness", Silent: "liveness",
    Identical: "liveness", PlainCounter: "resume", OwnGenerator: "resume", Unseeded: "global_state",
    LambdaAttribute: "checkpoint", BuiltTwice: "checkpoint", Grown: "checkpoint", PlainTensor: "checkpoint",
    Peeks: "no_label_leak", SetsThreads: "global_state", TouchesTrainer: "global_state", Cancels: "precision",
    WritesHalf: "precision", StepsByItself: "accumulation", NoHook: "construction",
    Misspelt: "construction", WrongShape: "lifecycle",
}  # fmt: skip
BROKEN_UNDER_DDP = {
    LocalBank: "uda.nn.Bank", UnusedHead: "unused_parameters = True", WaitsForEver: "waits for the other",
}  # fmt: skip
