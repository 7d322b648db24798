"""Adapter, stream orders, and methods against formulas written out again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import ETA, LAME, SAR, TENT, Adapter, BNStatistics, Guard, Source, lame
from uda_testtime.reliable import top_layers
from uda_testtime.streams import stream_order
from uda_testtime.surgery import mix_statistics

from uda.errors import UDAError


def test_tent_is_its_formula(net, batches):
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


def forward(model, x, gamma, beta):
    h = model[0](x)
    h = (h - h.mean(0)) / ((h - h.mean(0)).square().mean(0) + 1e-5).sqrt() * gamma + beta
    z = model[3](h.clamp_min(0))
    p = z.exp() / z.exp().sum(1, keepdim=True)
    return p, -(p * p.log()).sum(1)


def test_eta_is_its_formula(net, batches):
    model, a = net(), Adapter(net(), ETA(lr=0.1, optimizer="sgd", margin=0.9, redundancy=0.95))
    theta = [p.detach().clone().requires_grad_() for p in (model[1].weight, model[1].bias)]
    momentum, mean, kept = [0, 0], None, []
    for x in batches(4):
        a(x)
        p, h = forward(model, x, *theta)
        rows = [i for i in range(16) if h[i] < 0.9 * math.log(3)]
        if mean is not None:
            rows = [i for i in rows if abs(float(p[i] @ mean / p[i].norm() / mean.norm())) < 0.95]
        kept.append(len(rows))
        if not rows:
            continue
        new = sum(p[i].detach() for i in rows) / len(rows)
        mean = new if mean is None else 0.9 * mean + 0.1 * new
        loss = sum(math.exp(0.9 * math.log(3) - float(h[i].detach())) * h[i] for i in rows) / len(rows)
        for i, g in enumerate(torch.autograd.grad(loss, theta)):
            momentum[i] = 0.9 * momentum[i] + g
            theta[i].data -= 0.1 * momentum[i]
    assert 0 < kept[1] < 16
    assert torch.allclose(a.parameters[0], theta[0])
    assert torch.allclose(a.state["mean"], mean)


def test_sar_is_its_formula(net, batches):
    model, a = net(), Adapter(net(), SAR(lr=0.1, margin=0.9, rho=0.3, recovery=0))
    theta, limit = [p.detach().clone().requires_grad_() for p in (model[1].weight, model[1].bias)], 0.9 * math.log(3)
    momentum, average = [0, 0], None
    for x in batches(3):
        a(x)
        h = forward(model, x, *theta)[1]
        rows = h < limit
        g = torch.autograd.grad(h[rows].mean(), theta)
        size = math.sqrt(sum(float((v**2).sum()) for v in g))
        moved = [(t + 0.3 * v / size).detach().requires_grad_() for t, v in zip(theta, g, strict=True)]
        h2 = forward(model, x, *moved)[1]
        loss = h2[rows & (h2 < limit)].mean()
        average = float(loss) if average is None else 0.9 * average + 0.1 * float(loss)
        for i, v in enumerate(torch.autograd.grad(loss, moved)):
            momentum[i] = 0.9 * momentum[i] + v
            theta[i].data -= 0.1 * momentum[i]
    assert torch.allclose(a.parameters[1], theta[1])
    assert a.state["loss"] == pytest.approx(average)
    assert Adapter(net(), SAR(recovery=9.0, margin=0.9))(batches(1)[0]) is not None


def test_sar_leaves_layers_near_the_output_alone():
    resnet = [f"net.layer{i}.{j}.bn1" for i in (1, 2, 3, 4) for j in (0, 1)]
    assert top_layers(resnet) == ["net.layer4.0.bn1", "net.layer4.1.bn1"]
    vit = ["patch_embed.norm", *(f"blocks.{i}.norm1" for i in range(12)), "norm"]
    assert top_layers(vit) == ["blocks.9.norm1", "blocks.10.norm1", "blocks.11.norm1", "norm"]
    swin = [f"layers.{i}.blocks.{j}.norm1" for i in (0, 1) for j in range(12)]
    assert top_layers(swin) == swin[18:]
    assert top_layers(["0", "1", "2"]) == []

    def small():
        layers = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.BatchNorm1d(4)) for _ in range(4)]
        return nn.Sequential(*layers, nn.Linear(4, 3))

    for options, trained in (({}, 6), ({"skip": []}, 8), ({"skip": ["0", "2.1"]}, 5), ({"skip_last": 0.5}, 4)):
        a = Adapter(small(), SAR(lr=0.1, margin=2.0, recovery=0, **options))
        assert len(a.parameters) == 2 * trained
        start = a.snapshot()["parameters"]
        a(torch.randn(8, 4))
        assert a.updates == 1
        assert any(not torch.equal(p, q) for p, q in zip(a.parameters, start, strict=True))
    for bad, told in ((["4"], "is named '4'"), (["0", "1", "2", "3"], "leaves no")):
        with pytest.raises(UDAError, match=told):
            Adapter(small(), SAR(skip=bad))
    with pytest.raises(UDAError, match="share"):
        SAR(skip_last=1.0)


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


def test_statistics_mix_by_the_share_of_the_source(net, batches):
    x, model = batches(1)[0], net()
    h = model[0](x)
    mean = 0.9 * model[1].running_mean + 0.1 * h.mean(0)
    var = 0.9 * model[1].running_var + 0.1 * h.var(0, correction=0)
    out = model[3](((h - mean) / (var + 1e-5).sqrt() * model[1].weight + model[1].bias).relu())
    assert torch.allclose(Adapter(model, BNStatistics(0.9))(x), out)
    assert torch.equal(Adapter(model, BNStatistics(1.0))(x), model(x))
    a = Adapter(model, Source())
    layer = a.net[1]
    assert mix_statistics(a, 0.0) == 1
    assert a.net[1] is not layer
    assert repr(a.export()) == repr(model)


@pytest.mark.parametrize(
    ("method", "base"),
    [(TENT(lr=0), BNStatistics()), (TENT(weight=0), BNStatistics()), (LAME(k=0), Source()),
     (ETA(lr=0), BNStatistics()), (ETA(weight=0), BNStatistics()), (SAR(lr=0), BNStatistics()),
     (SAR(weight=0), BNStatistics())],
)
def test_without_effect_it_is_the_base_prediction(method, base, net, batches):
    a, b = Adapter(net(), method), Adapter(net(), base)
    assert all(torch.equal(a(x), b(x)) for x in batches())


@pytest.mark.parametrize("make", [TENT, lambda: ETA(margin=0.9, redundancy=0.99), lambda: SAR(lr=0.1, margin=0.9)])
def test_reset_and_resume_are_exact(make, net, batches):
    a = Adapter(net(), make())
    first = [a(x) for x in batches()]
    a.reset()
    assert all(torch.equal(a(x), z) for x, z in zip(batches()[:2], first, strict=False))
    saved, b = a.snapshot(), Adapter(net(), make())
    b.restore(saved)
    assert all(torch.equal(b(x), z) for x, z in zip(batches()[2:], first[2:], strict=True))
    assert not torch.equal(first[-1], Adapter(net(), BNStatistics())(batches()[-1]))  # it does something


def test_guard_catches_a_collapse(net, batches):
    free, kept = Adapter(net(), TENT(lr=0.5)), Adapter(net(), TENT(lr=0.5), guard=Guard(window=64, drift=0.5))
    for x in batches(40):
        free(x), kept(x)
    assert kept.rollbacks > 0
    assert free.rollbacks == 0


def test_budget_bounds_the_updates(net, batches):
    a = Adapter(net(), TENT(), updates_per_batch=0.25)
    for x in batches(8):
        a(x)
    assert (a.batches, a.updates) == (8, 2)


def test_bad_input_and_settings(net, batches):
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
