"""UniOT: plans against their conditions of optimality, and choices by loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from uda_universal import UniOT
from uda_universal.detection import EPSILON, TAU, adaptive_filling, confident, mass_of_rows, match
from uda_universal.uniot import cluster_targets, private_class_discovery

import uda
from uda.testing import check_plugin


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_match_is_the_optimum_and_rows_follow_from_the_scalings():
    s = torch.tensor(unit(7, 4) @ unit(3, 4, seed=1).T)
    beta = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    found = match(s, beta, tol=1e-12, max_iter=20000)
    plan = found.plan * found.total
    # stationary: -S + eps log P + tau log(row / a) + tau log(column / beta) = 0
    marginals = (plan.sum(1, keepdim=True) * 7).log() + (plan.sum(0) / beta).log()
    residual = -s + EPSILON * plan.log() + TAU * marginals
    assert float(residual.abs().max()) < 1e-6
    torch.testing.assert_close(mass_of_rows(s, found.log_v, 7), plan.log(), rtol=1e-6, atol=1e-6)


def test_confident_by_loops():
    found = match(torch.tensor(unit(9, 4) @ unit(3, 4, seed=2).T), torch.full((3,), 1 / 3, dtype=torch.double))
    label, keep = confident(found)
    plan = found.plan.numpy()
    for i in range(9):
        c = plan[i].argmax()
        assert label[i] == c
        assert keep[i] == (plan[i, c] > 1 / 9 and plan[:, c].sum() >= 1 / 3)


@pytest.mark.parametrize("gamma", [-1.0, 0.99])
def test_filling_balances_the_rows(gamma):
    f, w = (torch.tensor(v) for v in (unit(12, 4), unit(3, 4, seed=3)))
    beta = torch.full((3,), 1 / 3, dtype=torch.double)
    out = adaptive_filling(f, w, beta, gamma, torch.Generator().manual_seed(0))
    assert torch.equal(out[-12:], f @ w.T)
    assert len(out) == 24
    if gamma < 0:  # all are near: what is added lies half way to the farthest class
        far = torch.nn.functional.normalize((f + w[(f @ w.T).argmin(1)]) / 2, dim=1) @ w.T
        assert all((far - row).abs().sum(1).min() < 1e-9 for row in out[:12])


def test_clusters_get_equal_mass_and_neighbours_are_drawn_together():
    q = cluster_targets(torch.tensor(unit(40, 5) @ unit(4, 5, seed=1).T), iterations=200)
    assert q.sum(1).tolist() == pytest.approx([1.0] * 40)
    assert q.sum(0).tolist() == pytest.approx([10.0] * 4, rel=1e-2)
    torch.manual_seed(0)
    f = torch.nn.functional.normalize(torch.randn(8, 5), dim=1).requires_grad_()
    heads = uda.nn.CosineHead(5, 4, 0.1)
    memory, allowed = torch.nn.functional.normalize(torch.randn(10, 5), dim=1), torch.arange(10) < 6
    optimiser = torch.optim.SGD([*heads.parameters()], lr=0.1)
    values = []
    for _ in range(30):
        loss = private_class_discovery(f, memory, allowed, memory[:4], heads)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(float(loss.detach()))
    assert f.grad.abs().sum() > 0
    assert values[-1] < values[0]


def test_bad_arguments():
    for make in (lambda: UniOT(mu=2.0), lambda: UniOT(temperature=0.0), lambda: UniOT(clusters=0)):
        with pytest.raises(uda.UDAError):
            make()


@pytest.mark.slow
def test_plugin():
    # in eight samples of one direction, none is confident beside the memory's
    given = {"model_args": {"head": "cosine"}, "data_args": {"batch_size": 16}}
    check_plugin(UniOT, init_args={"clusters": 6, "fill": 24, "warmup": 0}, ddp=False, **given)
