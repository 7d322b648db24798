"""Shared by the tests of the conditioned networks."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def stir():
    """Random weights at which every piece matters: new attention and blocks start (nearly) neutral."""

    def change(model):
        g = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=g))
        return model

    return change
