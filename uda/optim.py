"""Optimisers by parameter group, and learning-rate schedules over the progress of the whole training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from uda.described import Described
from uda.errors import UDAError


class Schedule(Described, ABC):
    """Factor of the learning rate as a function of progress in [0, 1].

    Args:
        warmup: share of the training with a linear rise from 0; the decay's own value is multiplied by it.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise UDAError(
                f"warmup is the share of the training in [0, 1) that the rise takes, not {warmup}."
            )
        self.warmup = warmup

    @abstractmethod
    def decay(self, progress: float) -> float:
        """Factor without the warm-up."""

    def factor(self, progress: float) -> float:
        """Factor of the learning rate when the share ``progress`` of the training is done."""
        rise = min(1.0, progress / self.warmup) if self.warmup else 1.0
        return rise * self.decay(progress)


class Constant(Schedule):
    """The full rate after the warm-up."""

    def decay(self, progress: float) -> float:
        """1."""
        return 1.0


class InverseDecay(Schedule):
    """``(1 + gamma p)^-power`` (Ganin et al., 2016, section 5.2.2).

    A recipe that gives gamma by iteration i, ``(1 + g i)^-power``, has ``gamma = g * (number of steps)``.
    """

    def __init__(self, gamma: float = 10.0, power: float = 0.75, warmup: float = 0.0) -> None:
        super().__init__(warmup)
        self.gamma, self.power = gamma, power

    def decay(self, progress: float) -> float:
        """``(1 + gamma p)^-power``."""
        return (1 + self.gamma * progress) ** -self.power


class Cosine(Schedule):
    """Half a cosine from 1 at the end of the warm-up to ``final`` (Loshchilov & Hutter, 2017)."""

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        super().__init__(warmup)
        self.final = final

    def decay(self, progress: float) -> float:
        """``final + (1 - final) (1 + cos(pi q)) / 2`` with q the progress after the warm-up."""
        q = max(0.0, progress - self.warmup) / (1 - self.warmup)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * q)) / 2


class Restarts(Schedule):
    """Another schedule, from its start in each of ``times`` equal parts of the run (Loshchilov & Hutter, 2017).

    For methods that train in rounds: as many restarts as rounds.
    """

    def __init__(self, schedule: Schedule, times: int) -> None:
        super().__init__()
        if times < 1:
            raise UDAError(f"Restarts: times is the number of equal parts of the run, 1 or more, not {times}.")
        self.schedule, self.times = schedule, times

    def decay(self, progress: float) -> float:
        """The schedule's factor at the share of the part that is done."""
        done = progress * self.times
        part = min(int(done + 1e-9), self.times - 1)  # a step at the border of two parts starts the second
        return self.schedule.factor(min(1.0, max(0.0, done - part)))


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """SGD with Nesterov momentum 0.9, rate 0.01 and weight decay 1e-3: the field's usual choice."""
    return torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)


def no_decay(module: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """Two groups of a module's parameters: weights, and biases and norm parameters without weight decay.

    Args:
        options: keys of both groups, such as ``name`` and ``lr_scale``.
    """
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    name = options.pop("name", type(module).__name__)
    return [
        {"params": matrices, "name": name, **options},
        {"params": vectors, "name": f"{name}_no_decay", "weight_decay": 0.0, **options},
    ]


def _clean(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with trainable parameters only, each claimed once, under distinct names."""
    owner: dict[int, str] = {}
    taken: set[str] = set()
    cleaned = []
    for i, group in enumerate(groups):
        params = group["params"]
        params = [params] if isinstance(params, torch.Tensor) else list(params)
        label = group.get("name", f"group{i}")
        for p in params:
            if id(p) in owner:
                raise UDAError(
                    f"A parameter of shape {tuple(p.shape)} is claimed twice, by {owner[id(p)]!r} and by "
                    f"{label!r}: each parameter belongs to one optimiser group."
                )
            owner[id(p)] = label
        name, n = label, 2
        while name in taken:  # learning-rate monitors need distinct names
            name, n = f"{label}_{n}", n + 1
        taken.add(name)
        if params := [p for p in params if p.requires_grad]:
            cleaned.append({"lr_scale": 1.0, **group, "params": params, "name": name})
    return cleaned


def build_optimizer(
    optimizer: Callable[[list[dict[str, Any]]], Optimizer], groups: Iterable[dict[str, Any]]
) -> Optimizer:
    """An optimiser whose groups run at ``lr * lr_scale``.

    Args:
        optimizer: makes the optimiser from a list of groups, such as :func:`default_optimizer`.
        groups: ``{"params": ..., "name": "head", "lr_scale": 1.0, ...}``; further keys go to the optimiser.
            Frozen parameters and groups without trainable ones are dropped.

    Raises:
        UDAError: where two groups claim one parameter, or nothing is trainable.
    """
    cleaned = _clean(groups)
    if not cleaned:
        raise UDAError("No parameter requires a gradient, so there is nothing to train.")
    built = optimizer(cleaned)
    if not isinstance(built, Optimizer):
        raise UDAError(
            f"The optimizer must be a callable that returns a torch Optimizer, not {type(built).__name__}."
        )
    for group in built.param_groups:
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
        group["initial_lr"] = group["lr"]
    return built


def skeleton_groups(model: Any) -> list[dict[str, Any]]:
    """Groups of :meth:`uda.UDA.parameter_groups`."""
    groups: list[dict[str, Any]] = [
        {"name": "backbone", "params": list(model.backbone.parameters()), "lr_scale": model._backbone_lr_scale},
        {"name": "bottleneck", "params": list(model.bottleneck.parameters())},
        {"name": "head", "params": list(model.head.parameters())},
    ]
    claimed: list[dict[str, Any]] = []
    for key, found in model.hooks.each("param_groups", model=model):
        claimed += [{"name": f"{key}.{i}", **g, "params": list(g["params"])} for i, g in enumerate(found)]
    taken = {id(p) for g in claimed for p in g["params"]}
    own = {id(p) for plugin in model.plugins.values() for p in plugin.parameters()}
    for g in groups:  # a plugin may claim parameters of the skeleton (and then owns their rate)
        g["params"] = [p for p in g["params"] if id(p) not in taken and id(p) not in own]
    rest = [
        {"name": key, "params": [p for p in plugin.parameters() if id(p) not in taken]}
        for key, plugin in model.plugins.items()
    ]
    return groups + claimed + rest


def build_scheduler(optimizer: Optimizer, schedule: Schedule, total_steps: int) -> LambdaLR:
    """A scheduler, stepped with the optimiser, whose rate follows ``schedule.factor(step / total_steps)``.

    Raises:
        UDAError: where the number of steps is not a finite positive number.
    """
    if not 0 < total_steps < math.inf:
        raise UDAError(
            f"The schedule needs a known number of steps, not {total_steps}: set the trainer's max_epochs or "
            "max_steps."
        )

    # a plain function: a callable object's state, and so the schedule, would be pickled into each checkpoint
    def factor(step: int) -> float:
        return schedule.factor(min(step / total_steps, 1.0))

    return LambdaLR(optimizer, factor)
