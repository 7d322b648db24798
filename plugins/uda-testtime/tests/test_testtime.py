"""Adapter, stream orders, and methods against formulas written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import LAME, TENT, Adapter, BNStatistics, Guard, Source, lame
from uda_testtime.streams import stream_order
from uda_testtime.surgery import mix_statistics, restore_norms

from uda.errors import UDAError


def net() -> nn.Module:
    torch.manual_seed(0)
    out = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).double()
    out(torch.randn(50, 4, dtype=torch.float64) + 1)
    return out.eval()


def batches(n: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [2 * torch.randn(16, 4, generator=g, dtype=torch.float64) - 1 for _ in range(n)]


def test_tent_is_its_formula():
    model, a = net(), Adapter(net(), TENT(lr=0.1, optimizer="sgd"))
    gamma, beta = (p.detach().clone().requires_grad_() for p in (model[1].weight, model[1].bias))
    momentum = [torch.zeros(6).double(), torch.zeros(6).double()]
    for x in batches(3):
        h = model[0](x)
        h = (h - h.mean(0)) / ((h - h.mean(0)).square().mean(0) + 1e-5).sqrt() * gamma + beta
        z = model[3](h.clamp_min(0))
        assert torch.allclose(a(x), z)
        p = z.exp() / z.exp().sum(1, keepdim=True)
        grads = torch.autograd.grad(-(p * p.log()).sum() / len(x), [gamma, beta])
        with torch.no_grad():
            for i, (t, g) in enumerate(zip((gamma, beta), grads, strict=True)):
                momentum[i] = 0.9 * momentum[i] + g
                t -= 0.1 * momentum[i]
    assert torch.allclose(a.parameters[0], gamma)


def test_lame_is_its_formula():
    g = torch.Generator().manual_seed(2)
    p = torch.randn(9, 3, generator=g, dtype=torch.float64).softmax(1)
    f = torch.randn(9, 5, generator=g, dtype=torch.float64)
    q, v, y = p.numpy(), f.numpy(), p.numpy()
    u = v / np.linalg.norm(v, axis=1, keepdims=True)
    for _ in range(4):
        new = np.zeros_like(y)
        for i in range(9):
            near = sorted((j for j in range(9) if j != i), key=lambda j: -u[i] @ u[j])[:2]
            e = np.exp(np.log(q[i] + 1e-10) + sum(y[j] for j in near))
            new[i] = e / e.sum()
        y = new
    assert np.allclose(lame(p, f, 2, rounds=4).numpy(), y)


def test_statistics_mix_by_the_share_of_the_source():
    x, model = batches(1)[0], net()
    h = model[0](x)
    mean = 0.9 * model[1].running_mean + 0.1 * h.mean(0)
    var = 0.9 * model[1].running_var + 0.1 * h.var(0, correction=0)
    out = model[3](((h - mean) / (var + 1e-5).sqrt() * model[1].weight + model[1].bias).relu())
    assert torch.allclose(Adapter(model, BNStatistics(0.9))(x), out)
    assert torch.equal(Adapter(model, BNStatistics(1.0))(x), model(x))
    layer = model[1]
    assert mix_statistics(model, 0.0) == 1
    restore_norms(model)
    assert model[1] is layer


@pytest.mark.parametrize(
    ("method", "base"),
    [(TENT(lr=0), BNStatistics()), (TENT(weight=0), BNStatistics()), (LAME(k=0), Source())],
)
def test_without_effect_it_is_the_base_prediction(method, base):
    a, b = Adapter(net(), method), Adapter(net(), base)
    assert all(torch.equal(a(x), b(x)) for x in batches())


def test_reset_and_resume_are_exact():
    a = Adapter(net(), TENT())
    first = [a(x) for x in batches()]
    a.reset()
    assert all(torch.equal(a(x), z) for x, z in zip(batches()[:2], first, strict=False))
    saved, b = a.snapshot(), Adapter(net(), TENT())
    b.restore(saved)
    assert all(torch.equal(b(x), z) for x, z in zip(batches()[2:], first[2:], strict=True))
    assert not torch.equal(first[-1], Adapter(net(), BNStatistics())(batches()[-1]))  # it does something


def test_guard_catches_a_collapse():
    free, kept = Adapter(net(), TENT(lr=0.5)), Adapter(net(), TENT(lr=0.5), guard=Guard(window=64, drift=0.5))
    for x in batches(40):
        free(x), kept(x)
    assert kept.rollbacks > 0
    assert free.rollbacks == 0


def test_budget_bounds_the_updates():
    a = Adapter(net(), TENT(), updates_per_batch=0.25)
    for x in batches(8):
        a(x)
    assert (a.batches, a.updates) == (8, 2)


def test_bad_input_and_settings():
    x, a = batches(1)[0], Adapter(net(), TENT())
    with torch.inference_mode():
        a(x + 0)
    for bad, told in ((x[:0], "empty"), (x[:, :3], "shape"), (x * np.nan, "NaN")):
        with pytest.raises(UDAError, match=told):
            a(bad)
    bare = nn.Sequential(nn.Linear(4, 3))
    for method in (TENT(), BNStatistics()):
        with pytest.raises(UDAError, match="no "):
            Adapter(bare, method)
    with pytest.raises(UDAError, match=r"torch\.compile"):
        Adapter(torch.compile(net()), TENT())


def test_orders():
    labels = [np.arange(30) % 3, np.arange(20) % 3]
    for setting in ("continual", "mixed", "correlated", "mixed_correlated"):
        for delta in (0.0, 0.1):
            order = stream_order(labels, setting, 0, delta)
            assert len({tuple(r) for r in order}) == 50
    order = stream_order(labels, "correlated", 0)
    y = np.array([labels[s][i] for s, i in order])
    assert (np.diff(order[:, 0]) >= 0).all()
    assert (np.diff(y) != 0).sum() <= 5
    with pytest.raises(UDAError, match="empty"):
        stream_order([], "mixed", 0)
