"""A model of a few numbers, a step of it, and an optimiser by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import uda


@pytest.fixture
def make_step():
    """``make_step({"align": plugin}, **model arguments)`` -> model and step; features of 4, classes 3.

    The backbone is the identity and there is no bottleneck unless asked for, so that features are inputs.
    """

    def make(plugins, progress=0.5, seed=0, rows=(6, 5), **options):
        torch.manual_seed(seed)
        given = {"bottleneck": 0, "bottleneck_norm": "none", "source_names": ["s"], **options}
        model = uda.UDA("identity", plugins, num_classes=3, input_shape=[4], **given)
        y = torch.randint(0, 3, (rows[0],))
        source = {"x": torch.randn(rows[0], 4), "y": y, "index": torch.arange(rows[0])}
        data = {"sources": {"s": source}, "target": {"x": torch.randn(rows[1], 4), "index": torch.arange(rows[1])}}
        return model, uda.Step(model, data, progress, 0, 0)

    return make


@pytest.fixture
def by_hand():
    """``by_hand(model, lr)`` -> list of the updates that a manual method makes, each a plain gradient step."""

    def attach(model, lr):
        groups = [g for g in model.parameter_groups() if g["params"]]
        updates = []

        def update(loss, only=None, phase="step"):
            chosen = [p for g in groups if only is None or g["name"] in only for p in g["params"]]
            grads = torch.autograd.grad(loss, chosen, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for p, g in zip(chosen, grads, strict=True):
                    p -= lr * g
            updates.append((phase, only, float(loss.detach())))

        object.__setattr__(model, "manual_update", update)
        object.__setattr__(model, "optimizers", lambda use_pl_optimizer=True: SimpleNamespace(param_groups=groups))
        return updates

    return attach
