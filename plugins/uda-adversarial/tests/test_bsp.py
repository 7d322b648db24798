"""BSP against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from uda_adversarial import BSP
from uda_adversarial.bsp import leading_energy

import uda
from uda.testing import check_plugin


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (4, 4)])
@pytest.mark.parametrize("k", [1, 2])
def test_energy_and_gradient_against_numpy(shape, k):
    x = np.random.default_rng(0).normal(size=shape) + 0.5
    u, s, v = np.linalg.svd(x, full_matrices=False)
    leaf = torch.tensor(x, requires_grad=True)
    value = leading_energy(leaf, k)
    assert float(value) == pytest.approx((s[:k] ** 2).sum(), rel=1e-10)
    (grad,) = torch.autograd.grad(value, [leaf])
    np.testing.assert_allclose(grad.numpy(), 2 * (u[:, :k] * s[:k]) @ v[:k], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("x", [torch.zeros(4, 6), torch.eye(4), torch.ones(4, 6)], ids=["zero", "equal", "rank one"])
def test_gradient_is_finite_where_singular_values_meet(x):
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(leading_energy(leaf), [leaf])
    assert grad.isfinite().all()


def test_objective_is_of_both_domains(make_step):
    plugin = BSP(weight=0.1, k=2)
    _, step = make_step({"align": plugin})
    energies = [np.linalg.svd(b.x.double().numpy(), compute_uv=False)[:2] ** 2 for b in (step.source, step.target)]
    assert float(plugin.align_features(step)["spectral"]) == pytest.approx(0.1 * np.sum(energies), rel=1e-5)


def test_descent_evens_out_the_directions():
    x = torch.randn(20, 6) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    share = [float((torch.linalg.svdvals(x)[0] ** 2) / x.square().sum())]
    for _ in range(20):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(leading_energy(leaf), [leaf])
        x = x - 0.02 * grad
    share.append(float((torch.linalg.svdvals(x)[0] ** 2) / x.square().sum()))
    assert share[1] < 0.7 * share[0]


def test_bad_arguments_are_refused():
    for arguments in ({"weight": -1.0}, {"k": 0}):
        with pytest.raises(uda.UDAError, match="k must be 1 or more"):
            BSP(**arguments)


@pytest.mark.slow
def test_plugin():
    report = check_plugin(BSP, init_args={"weight": 0.01}, ddp=False)
    assert report.objectives == ["spectral"]
    assert not report.warnings
