"""BNM against the singular values of numpy, and the fast form against sorted column norms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_selftraining import BNM

import uda
from uda.testing import check_plugin


def objective(plugin, logits, progress=0.5):
    (value,) = plugin.refine_classifier(
        SimpleNamespace(target=SimpleNamespace(logits=logits), progress=progress)
    ).values()
    return value


def probabilities(logits) -> np.ndarray:
    e = np.exp(logits.detach().double().numpy())
    return e / e.sum(1, keepdims=True)


def draw(*shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(9, 4), (3, 5), (1, 4)])
@pytest.mark.parametrize("scale", ["batch", "mean", "bound"])
def test_nuclear_norm(shape, scale):
    """The norm as the trace of the root of P^T P, from its eigenvalues."""
    logits, (b, c) = draw(*shape), shape
    p = probabilities(logits)
    norm = np.sqrt(np.clip(np.linalg.eigvalsh(p @ p.T if b < c else p.T @ p), 0, None)).sum()
    divisor = {"batch": b, "mean": min(b, c), "bound": math.sqrt(b * min(b, c))}[scale]
    assert float(objective(BNM(weight=0.7, scale=scale), logits)) == pytest.approx(0.7 * (1 - norm / divisor), abs=1e-5)


@pytest.mark.parametrize("shape", [(9, 4), (3, 5)])
def test_fast_form(shape):
    logits = draw(*shape)
    columns = sorted((math.sqrt(sum(v * v for v in col)) for col in probabilities(logits).T.tolist()), reverse=True)
    expected = 1 - sum(columns[: min(shape)]) / shape[0]
    assert float(objective(BNM(fast=True), logits)) == pytest.approx(expected, abs=1e-5)


def test_bounds():
    """Sure predictions that use all classes alike reach the largest norm, one class for all the smallest."""
    sure, one, flat = 100 * torch.eye(4).repeat(3, 1), 100 * torch.eye(4)[[0] * 12], torch.zeros(12, 4)
    for fast in (False, True):
        plugin = BNM(scale="bound", fast=fast)
        assert float(objective(plugin, sure)) == pytest.approx(0, abs=1e-6)
        assert float(objective(plugin, one)) == pytest.approx(0.5, abs=1e-6)
    assert float(objective(BNM(scale="bound"), flat)) == pytest.approx(0.75, abs=1e-6)


def test_gradient_is_that_of_the_norm():
    """U V^T of numpy's decomposition, through the softmax by its Jacobian."""
    logits = draw(6, 4).double().requires_grad_()
    (got,) = torch.autograd.grad(objective(BNM(), logits), [logits])
    p = probabilities(logits)
    u, _, vt = np.linalg.svd(p, full_matrices=False)
    outer = -(u @ vt) / 6
    expected = p * (outer - (outer * p).sum(1, keepdims=True))
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-8)


@pytest.mark.parametrize("fast", [False, True])
def test_gradient_is_finite_where_singular_values_repeat(fast):
    for logits in (torch.zeros(8, 5), 50 * torch.eye(5)[[0, 1, 2, 3, 4, 0, 1, 2]], draw(1, 5).expand(8, 5)):
        logits = logits.clone().requires_grad_()
        (grad,) = torch.autograd.grad(objective(BNM(fast=fast), logits), [logits])
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("fast", [False, True])
def test_descent_makes_predictions_sure_and_diverse(fast):
    logits = (0.5 * draw(30, 3)).requires_grad_()

    def stand():
        p = logits.detach().softmax(1)
        return p.amax(1).mean(), p.mean(0).min()

    before = stand()
    for _ in range(200):
        (grad,) = torch.autograd.grad(objective(BNM(fast=fast), logits), [logits])
        logits = (logits - 20 * grad).detach().requires_grad_()
    after = stand()
    assert after[0] > max(before[0], 0.9)
    assert after[1] > 0.15


def test_ramp_and_bad_arguments():
    logits = draw(5, 3)
    torch.testing.assert_close(objective(BNM(ramp="linear"), logits, 0.25), 0.25 * objective(BNM(), logits))
    with pytest.raises(uda.UDAError, match="'bound'"):
        BNM(scale="bond")
    with pytest.raises(uda.UDAError, match="negative"):
        BNM(weight=-1.0)


@pytest.mark.slow
@pytest.mark.parametrize("init_args", [{}, {"fast": True, "scale": "mean"}])
def test_plugin(init_args):
    check_plugin(BNM, init_args=init_args, ddp=False)
