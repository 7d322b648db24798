"""A small network with BatchNorm, batches of another domain, samples of its source, and adapters made ready."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from uda_testtime import Adapter, SourceSamples


def _net() -> nn.Module:
    torch.manual_seed(0)
    out = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    out(torch.randn(50, 4, dtype=torch.float64) + 1)
    return out.eval()


class ResidualBlock(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(a, b, 3, padding=1, bias=False), nn.GroupNorm(2, b))
        self.skip = nn.Conv2d(a, b, 1)

    def forward(self, x):
        return torch.relu(self.body(x) + self.skip(x))


def _images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), ResidualBlock(4, 4), ResidualBlock(4, 6),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    ).eval()  # fmt: skip


def _batches(n: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [2 * torch.randn(16, 4, generator=g, dtype=torch.float64) - 1 for _ in range(n)]


def _source() -> SourceSamples:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return SourceSamples(x, torch.arange(48) % 3, torch.arange(48) % 2)


def _ready(method, **options) -> Adapter:
    a = Adapter(_net(), method, **options)
    if method.needs != "nothing":
        a.prepare(_source())
    return a


@pytest.fixture
def net():
    """``net()``: always the same."""
    return _net


@pytest.fixture
def images():
    """``images()``: always the same net, convolutional with residual blocks, for images of 8x8."""
    return _images


@pytest.fixture
def batches():
    """``batches(n)``: always the same."""
    return _batches


@pytest.fixture
def source():
    """``source()``: labelled samples."""
    return _source


@pytest.fixture
def ready():
    """``ready(method, **options)``: an adapter of ``net()``, prepared where the method wants it."""
    return _ready
