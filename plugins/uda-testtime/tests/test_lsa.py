"""LSA written out again: the shifted classifier, its training, and the inner method's step on shifted logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, BNStatistics, Source, SourceSamples
from uda_testtime.lsa import LSA, ShiftedHead, adjusted_loss, degree, label_distribution, shifted_logits, split

from uda.errors import UDAError

KNOWN = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


def imbalanced() -> SourceSamples:
    y = torch.tensor([0] * 30 + [1] * 12 + [2] * 6)
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, 0] += 1.5 * (y == 0)
    x[:, 1] += 1.5 * (y == 1)
    return SourceSamples(x, y)


def ready(net, method) -> Adapter:
    a = Adapter(net(), method)
    a.prepare(imbalanced())
    return a


def test_logits_and_degree_are_their_formulas():
    g = torch.Generator().manual_seed(0)
    head, h = nn.Linear(4, 3).double().requires_grad_(False), torch.randn(5, 4, generator=g).double()
    gamma, beta, dw, db = (torch.randn(s, generator=g).double() for s in ([4], [4], [3, 4], [3]))
    found = shifted_logits(head, h, gamma, beta, dw, db)
    w, b = head.weight.tolist(), head.bias.tolist()
    for i in range(5):
        for c in range(3):
            z = sum((w[c][d] + float(dw[c, d])) * float(gamma[d] * h[i, d] + beta[d]) for d in range(4))
            assert float(found[i, c]) == pytest.approx(z + b[c] + float(db[c]))
    flat = torch.cat([gamma - 1, beta, dw.flatten(), db])
    assert all(torch.allclose(p, q) for p, q in zip(split(flat, 4), (gamma, beta, dw, db), strict=True))
    logs = [math.log(p) for p in (0.6, 0.3, 0.1)]
    s = [v - sum(logs) / 3 for v in logs]
    wanted = sum(p * v / max(map(abs, s)) for p, v in zip((0.2, 0.5, 0.3), s, strict=True))
    assert float(degree(torch.tensor([0.2, 0.5, 0.3]).double(), KNOWN)) == pytest.approx(wanted)
    assert degree(KNOWN, torch.ones(3) / 3).tolist() == [0]
    # forward, balanced and backward distributions come in this order, and between -1 and 1
    line = [float(degree((t * KNOWN.log()).softmax(0), KNOWN)) for t in (1, 0.5, 0, -0.5, -1)]
    assert line == sorted(line, reverse=True)
    assert line[2] == pytest.approx(0, abs=1e-12)
    assert -1 <= line[-1] < 0 < line[0] <= 1
    for _ in range(20):  # on the line between forward and backward
        v = label_distribution(KNOWN, g).log()
        assert float((v - v.mean()) @ (KNOWN.log() - KNOWN.log().mean()) / (v - v.mean()).norm()) == pytest.approx(
            math.copysign(float((KNOWN.log() - KNOWN.log().mean()).norm()), float(v[0] - v[2])))  # fmt: skip
    assert float(label_distribution(KNOWN, g, 3.0).sum()) == pytest.approx(1)


def test_the_loss_is_least_at_the_posterior_under_the_other_label_distribution():
    counts = np.array([[30, 4, 1], [12, 10, 3], [18, 16, 6]])  # source samples of (x, y): p(y) is 60, 30, 10 in 100
    likelihood, prior = counts / counts.sum(0), np.array([0.2, 0.3, 0.5])
    posterior = likelihood * prior / (likelihood * prior).sum(1, keepdims=True)
    z = torch.tensor(np.log(posterior), requires_grad=True)
    rows = [(x, y) for x in range(3) for y in range(3) for _ in range(counts[x, y])]
    x, y = (torch.tensor(v) for v in zip(*rows, strict=True))
    loss = adjusted_loss(z[x], y, torch.tensor(prior), KNOWN)
    naive = 0.0
    for i, j in rows:
        e = [math.exp(float(z[i, c])) * float(KNOWN[c]) / prior[c] for c in range(3)]
        naive -= math.log(e[j] / sum(e)) / 100
    assert float(loss) == pytest.approx(naive)
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-12


def test_training_is_its_formula(net):
    method = LSA("BNStatistics", steps=3, adapter_lr=0.05, batch_size=48, hidden=5)
    a, model, g = ready(net, method), net(), torch.Generator().manual_seed(0)
    start = Adapter(net(), method).extra["label_shift"]
    torch.randint(2**31, (), generator=g)  # of the network's first weights
    order, data = torch.randperm(48, generator=g), imbalanced()
    h = model[0](data.x[order])
    h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * model[1].weight + model[1].bias).relu().detach()
    y, known = data.y[order], torch.tensor([31, 13, 7]).double() / 51
    assert torch.allclose(a.prepared["lsa_source"], known)
    optimizer = torch.optim.Adam(start.requires_grad_().parameters(), 0.05)
    for _ in range(3):
        rows = torch.randint(48, (48,), generator=g)
        prior = label_distribution(known, g)
        flat = start(degree(prior, known)) - start(degree(known, known))
        hidden = (1 + flat[:6]) * h[rows] + flat[6:12]
        z = hidden @ (model[3].weight + flat[12:30].view(3, 6)).T + model[3].bias + flat[30:]
        loss = -(z + known.log() - prior.log()).log_softmax(1)[torch.arange(48), y[rows]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for p, q in zip(a.extra["label_shift"].parameters(), start.parameters(), strict=True):
        assert torch.allclose(p, q)
        assert not p.requires_grad
    assert all(torch.equal(p, q) for p, q in zip(a.net[0].parameters(), model[0].parameters(), strict=True))


@pytest.mark.parametrize("condition", ["degree", "prior"])
def test_step_is_its_formula(condition, net, batches):
    a = ready(net, LSA("TENT", {"lr": 0.1, "optimizer": "sgd"}, condition, rate=0.3, steps=50, adapter_lr=0.01))
    model, g, known = net(), a.extra["label_shift"], a.prepared["lsa_source"]
    theta, momentum, prior = [p.detach().clone().requires_grad_() for p in model[1].parameters()], [0, 0], torch.ones(3)
    prior = prior.double() / 3

    def forward(x):
        told = (lambda p: degree(p, known)) if condition == "degree" else (lambda p: (3 * p + 0.1).log())
        flat = g(told(prior)) - g(told(known))
        h = model[0](x)
        h = ((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * theta[0] + theta[1]).relu()
        h = (1 + flat[:6]) * h + flat[6:12]
        return h @ (model[3].weight + flat[12:30].view(3, 6)).T + model[3].bias + flat[30:]

    for x in batches(3):
        prior = 0.7 * prior + 0.3 * forward(x).softmax(1).mean(0).detach()
        z = forward(x)
        assert torch.allclose(a(x), z)
        p = z.softmax(1)
        for i, d in enumerate(torch.autograd.grad(-(p * p.log()).sum(1).mean(), theta)):
            momentum[i] = 0.9 * momentum[i] + d
            theta[i].data -= 0.1 * momentum[i]
    assert torch.allclose(a.state["lsa_prior"], prior)
    assert all(torch.allclose(p, q) for p, q in zip(a.parameters, theta, strict=True))
    assert not torch.allclose(a.net[3].db, torch.zeros(3).double())


def test_without_a_shift_it_is_the_inner_method(net, batches, source):
    for method, base in ((LSA("TENT", {"lr": 0}, steps=0), BNStatistics()), (LSA("Source", steps=0), Source()),
                         (LSA("TENT", {"lr": 0}, steps=5, adapter_lr=0), BNStatistics())):  # fmt: skip
        a, b = ready(net, method), Adapter(net(), base)
        assert all(torch.equal(a(x), b(x)) for x in batches())
    a, b = ready(net, LSA("TENT", steps=0)), Adapter(net(), LSA("TENT").inner)
    assert all(torch.equal(a(x), b(x)) for x in batches())
    a, b = Adapter(net(), LSA("TENT", steps=20, adapter_lr=0.1)), Adapter(net(), LSA("TENT").inner)
    a.prepare(source())  # balanced: the degree says nothing
    assert all(torch.equal(a(x), b(x)) for x in batches())


def test_it_learns_the_label_distribution_of_the_stream():
    g = torch.Generator().manual_seed(0)

    def drawn(counts):
        y = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))[torch.randperm(sum(counts), generator=g)]
        return 1.2 * torch.eye(3)[y] + torch.randn(len(y), 3, generator=g), y

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Identity(), nn.Linear(3, 3)), drawn([600, 120, 20])
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    target, truth = drawn([20, 120, 600])
    a = Adapter(model, LSA("Source", adapter_lr=0.02, steps=150))
    a.prepare(SourceSamples(x, y))
    hits = torch.cat([a(v).argmax(1) for v in target.split(40)]) == truth
    assert hits.float().mean() > (model(target).argmax(1) == truth).float().mean() + 0.2
    assert a.state["lsa_prior"].argmax() == 2


def test_copies_of_the_net_are_shifted_alike(net, batches, tmp_path):
    a = ready(net, LSA("CoTTA", {"lr": 0.1, "views": 2, "threshold": 2.0}, steps=20, adapter_lr=0.05))
    a(batches()[0])
    heads = [m for m in (*a.net.modules(), *a.extra.modules()) if isinstance(m, ShiftedHead)]
    assert len(heads) == 3  # net, source, teacher
    assert all(torch.equal(m.dw, heads[0].dw) and m.dw.abs().max() > 0 for m in heads)
    assert repr(a.export()) == repr(net())
    ready(net, LSA(steps=3)).save_prepared(tmp_path / "ready.pt")
    b = Adapter(net(), LSA(steps=3))
    b.load_prepared(tmp_path / "ready.pt")
    assert torch.equal(b(batches()[0]), ready(net, LSA(steps=3))(batches()[0]))


def test_bad_input(net, source):
    for make, told in ((lambda: LSA("MEMO"), "forgets"), (lambda: LSA("LSA"), "no method"),
                       (lambda: LSA("TNET"), "TENT"), (lambda: LSA(condition="mean"), "not 'mean'")):  # fmt: skip
        with pytest.raises(UDAError, match=told):
            make()
    with pytest.raises(UDAError, match="no Linear"):
        Adapter(nn.Sequential(nn.BatchNorm1d(4)), LSA())
    deep = nn.Sequential(nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    with pytest.raises(UDAError, match="LSA"):
        Adapter(deep, LSA(), head="1")
    with pytest.raises(UDAError, match="labels"):
        Adapter(net(), LSA()).prepare(SourceSamples(source().x))
