"""A model of a few numbers with two sources, and a step of it."""

from __future__ import annotations

import pytest
import torch

import uda


@pytest.fixture
def make_step():
    """``make_step({"align": plugin}, **model arguments)`` -> model and step; features of 4, classes 3; sources a, b."""

    def make(plugins, progress=0.5, seed=0, rows=(6, 7, 5), names=("a", "b"), **options):
        torch.manual_seed(seed)
        sizes = {n: 10 * (i + 1) for i, n in enumerate(names)} | {"target": 30}
        given = {"bottleneck": 0, "bottleneck_norm": "none", "source_names": list(names), "sizes": sizes, **options}
        model = uda.UDA("identity", plugins, num_classes=3, input_shape=[4], **given)
        data = {"sources": {}, "target": {"x": torch.randn(rows[-1], 4), "index": torch.arange(rows[-1])}}
        for i, n in enumerate(names):
            y = torch.randint(0, 3, (rows[i],))
            data["sources"][n] = {"x": torch.randn(rows[i], 4) + i, "y": y, "index": torch.arange(rows[i])}
        return model, uda.Step(model, data, progress, 0, 0)

    return make
