from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from uda.nn import reverse_gradient, warm_start, warm_start_iterations


def test_forward_is_the_identity_and_backward_is_reversed():
    x = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(4, 3)
    out = reverse_gradient(x, 0.3)
    assert torch.equal(out, x)
    (out * weight).sum().backward()
    torch.testing.assert_close(x.grad, -0.3 * weight)


def test_only_what_comes_before_is_scaled():
    torch.manual_seed(0)
    before, after = nn.Linear(3, 3), nn.Linear(3, 1)
    x = torch.randn(5, 3)
    after(before(x)).square().mean().backward()
    plain = [p.grad.clone() for p in (*before.parameters(), *after.parameters())]
    before.zero_grad(), after.zero_grad()
    after(reverse_gradient(before(x), 2.0)).square().mean().backward()
    for p, g in zip(before.parameters(), plain[:2], strict=True):
        torch.testing.assert_close(p.grad, -2 * g)
    for p, g in zip(after.parameters(), plain[2:], strict=True):
        torch.testing.assert_close(p.grad, g)


def test_second_derivative():
    x = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(reverse_gradient(x, 2.0) ** 3, x, create_graph=True)[0]
    torch.testing.assert_close(first, -2 * 3 * x**2)
    second = torch.autograd.grad(first, x)[0]
    # the reversal acts on each pass through it: -2 * 6x reaches x by the reversed node again, times -2
    torch.testing.assert_close(second, (-2.0) * (-2.0) * 6 * x)


@pytest.mark.parametrize(
    ("p", "value"), [(0.0, 0.0), (0.1, 0.46211716), (0.5, 0.98661430), (1.0, 0.99990920)]
)
def test_ramp_of_the_paper(p, value):
    assert warm_start(p) == pytest.approx(value, abs=1e-8)
    assert warm_start(p, low=0.5, high=2.5) == pytest.approx(0.5 + 2 * value, abs=1e-7)


def test_ramp_by_iterations_is_another_curve():
    assert warm_start_iterations(0) == 0
    assert warm_start_iterations(1000) == pytest.approx(math.tanh(0.5))
    assert warm_start_iterations(4000) == pytest.approx(0.9640, abs=1e-4)
    assert warm_start_iterations(1000, alpha=10, max_iters=10_000) == pytest.approx(
        warm_start_iterations(1000)
    )
    assert warm_start_iterations(10**9) == 1
