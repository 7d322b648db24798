"""Methods of teachers, memories and views against formulas written out again."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, BNStatistics
from uda_testtime.adacontrast import AdaContrast, crop_view, instance_contrast, neighbour_labels, strong_view
from uda_testtime.cotta import CoTTA
from uda_testtime.eata import EATA
from uda_testtime.memo import MEMO, augmix_view
from uda_testtime.parts import same_prototype, symmetric_cross_entropy, view_contrast
from uda_testtime.petal import PETAL, quantile
from uda_testtime.rmt import RMT
from uda_testtime.roid import ROID
from uda_testtime.rotta import RoTTA, place
from uda_testtime.santa import SANTA


def forward(theta: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and logits with batch statistics, by hand."""
    h = x @ theta["0.weight"].T + theta["0.bias"]
    h = (h - h.mean(0)) / ((h - h.mean(0)).square().mean(0) + 1e-5).sqrt() * theta["1.weight"] + theta["1.bias"]
    h = h.clamp_min(0)
    return h, h @ theta["3.weight"].T + theta["3.bias"]


def leaves(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}


def soft(z: torch.Tensor) -> torch.Tensor:
    return z.exp() / z.exp().sum(1, keepdim=True)


def ce(target: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return -(soft(target) * soft(z).log()).sum(1)


def same(a: Adapter, theta: dict[str, torch.Tensor]) -> None:
    found = {n.replace(".norm", ""): p for n, p in a.net.named_parameters()}
    for n, p in theta.items():
        assert torch.allclose(found[n], p.detach()), n


def sgd(theta, loss, momentum, lr=0.1):
    names = [n for n in theta if theta[n].requires_grad]
    for n, g in zip(names, torch.autograd.grad(loss, [theta[n] for n in names]), strict=True):
        momentum[n] = 0.9 * momentum.get(n, 0) + g
        theta[n].data -= lr * momentum[n]


def norm_only(theta: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: p.requires_grad_(n.startswith("1.")) for n, p in theta.items()}


def test_eata_is_its_formula(net, batches, source, ready):
    a = ready(EATA(lr=0.1, optimizer="sgd", margin=2.0, redundancy=2.0, beta=3.0, batch_size=48))
    theta, order = norm_only(leaves(net())), torch.randperm(48, generator=torch.Generator().manual_seed(0))
    z = forward(theta, source().x[order])[1]
    loss = -sum(soft(z)[i, int(z[i].argmax())].log() for i in range(48)) / 48
    names = ("1.weight", "1.bias")
    fisher = [g**2 for g in torch.autograd.grad(loss, [theta[n] for n in names])]
    assert all(torch.allclose(f, g) for f, g in zip(fisher, a.prepared["fisher"], strict=True))
    start, momentum, e0 = [theta[n].detach().clone() for n in names], {}, 2 * math.log(3)
    for x in batches(3):
        z = forward(theta, x)[1]
        assert torch.allclose(a(x), z)
        h = ce(z, z)
        loss = ((e0 - h.detach()).exp() * h).mean()
        loss = loss + 3 * sum((f * (theta[n] - s) ** 2).sum() for f, n, s in zip(fisher, names, start, strict=True))
        sgd(theta, loss, momentum)
    same(a, theta)


@pytest.mark.parametrize("loss", ["ce", "symmetric"])
def test_cotta_is_its_formula(loss, net, batches, ready):
    a = ready(CoTTA(lr=0.1, optimizer="sgd", threshold=0.0, momentum=0.7, restore=0.0, loss=loss))
    theta, momentum = leaves(net()), {}
    teacher = {n: p.detach().clone() for n, p in theta.items()}
    for x in batches(3):
        z, t = forward(theta, x)[1], forward(teacher, x)[1].detach()
        assert torch.allclose(a(x), t)
        sgd(theta, (ce(t, z) if loss == "ce" else (ce(t, z) + ce(z, t)) / 2).mean(), momentum)
        teacher = {n: 0.7 * t + 0.3 * theta[n].detach() for n, t in teacher.items()}
    same(a, theta)


def test_cotta_asks_views_when_the_source_is_unsure_and_restores_at_random(net, batches, ready):
    plain, views = ready(CoTTA(threshold=0.0)), ready(CoTTA(threshold=1.0, views=3))
    x, scale = batches()[0], views.state
    g = torch.Generator().manual_seed(0)
    seen = [x + 0.1 * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=g).to(x) for _ in range(3)]
    model = ready(BNStatistics()).net
    assert torch.allclose(views(x), sum(model(v) for v in seen) / 3)
    assert torch.equal(plain(x), model(x))
    assert scale == {}
    back = ready(CoTTA(lr=0.1, restore=1.0))
    back(x)
    same(back, dict(net().named_parameters()))
    half = ready(CoTTA(lr=0.1, restore=0.5))
    half(x)
    moved = torch.cat([(p != q).flatten() for p, q in zip(half.parameters, net().parameters(), strict=True)])
    assert 0.2 < moved.double().mean() < 0.8


def test_roid_is_its_formula(net, batches, ready):
    a = ready(ROID(lr=0.1, optimizer="sgd", momentum=0.8, consistency=0.0, temperature=0.5))
    theta, momentum, prior = norm_only(leaves(net())), {}, np.full(3, 1 / 3)
    start = {n: p.detach().clone() for n, p in theta.items()}
    for x in batches(3):
        z = forward(theta, x)[1]
        p = soft(z).detach().numpy()
        div = np.array([1 - q @ prior / np.linalg.norm(q) / np.linalg.norm(prior) for q in p])
        cert = np.array([(q * np.log(q)).sum() for q in p])
        div, cert = ((v - v.min()) / (v.max() - v.min()) for v in (div, cert))
        w = np.where(div < div.mean(), 0, np.exp(div * cert / 0.5))
        assert 0 < (w == 0).sum() < 16
        prior = 0.9 * prior + 0.1 * p.mean(0)
        s = max(1 / 16, 1 / 3) / p.mean(0).max()
        smooth = (p.mean(0) + s) / (1 + 3 * s)
        wanted = p * smooth / (p * smooth).sum(1, keepdims=True)
        assert np.allclose(a(x).softmax(1), wanted)
        q = soft(z).clamp(max=0.99)
        slr = -(q * (q / (1 - q) + 1e-5).log()).sum(1)
        sgd(theta, sum(float(w[i]) * slr[i] for i in range(16)) / 16, momentum)
        for n, t in theta.items():
            t.data.copy_(0.8 * t.data + 0.2 * start[n])
    same(a, theta)
    assert ready(ROID())(batches()[0][:1]).isfinite().all()  # min-max of one sample
    x, z = batches()[0], ready(BNStatistics())(batches()[0])
    p = soft(z).mean(0)
    s = (1 / 3) / p.max()
    assert torch.allclose(ready(ROID(correction="logits"))(x), z * (p + s) / (1 + 3 * s))


def test_roid_compares_kept_samples_with_their_views(batches, ready):
    a = ready(ROID(lr=0.1, optimizer="sgd", momentum=1.0))
    b = ready(ROID(lr=0.1, optimizer="sgd", momentum=1.0, consistency=0.0))
    x = batches()[0]
    a(x), b(x)
    assert not torch.equal(a.parameters[0], b.parameters[0])
    z, y = torch.randn(2, 5, 3).double().requires_grad_().unbind()
    wanted = [-0.5 * sum(soft(z)[i, c] * soft(y)[i, c].log() + soft(y)[i, c] * soft(z)[i, c].log() for c in range(3))
              for i in range(5)]  # fmt: skip
    assert torch.allclose(symmetric_cross_entropy(z, y), torch.stack(wanted))


def test_rmt_is_its_formula(net, batches, source, ready):
    a = ready(RMT(lr=0.1, optimizer="sgd", momentum=0.7, warmup=96, batch_size=48, width=0, temperature=0.5))
    theta, momentum, g = leaves(net()), {}, torch.Generator().manual_seed(0)
    torch.randint(2**31, (), generator=g)  # the projector's
    f, y = forward(theta, source().x)[0].detach(), source().y
    torch.randperm(48, generator=g)
    prototypes = [f[y == c].mean(0) for c in range(3)]
    assert torch.allclose(a.prepared["prototypes"], torch.stack(prototypes))
    teacher = {n: p.detach().clone() for n, p in theta.items()}

    def follow():
        return {n: 0.7 * t + 0.3 * theta[n].detach() for n, t in teacher.items()}

    for lr in (0.05, 0.1):
        x = source().x[torch.randperm(48, generator=g)]
        t, z = forward(teacher, x)[1], forward(theta, x)[1]
        sgd(theta, ((ce(t, z) + ce(z, t)) / 2).mean(), momentum, lr)
        teacher = follow()
    for x in batches(2):
        v = x + 0.1 * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=g).to(x)
        (f, z), (fv, zv), t = forward(theta, x), forward(theta, v), forward(teacher, x)[1]
        assert torch.allclose(a(x), z + t)
        near = [max(range(3), key=lambda c: float(f[i].detach() @ prototypes[c] / prototypes[c].norm()))
                for i in range(16)]
        rows = [r / r.norm().clamp_min(1e-12) for i in range(16) for r in (prototypes[near[i]], f[i], fv[i])]
        contrast = 0
        for i in range(48):
            bottom = sum((rows[i] @ rows[j] / 0.5).exp() for j in range(48) if j != i)
            for j in range(48):
                if j != i and j // 3 == i // 3:
                    contrast = contrast - ((rows[i] @ rows[j] / 0.5).exp() / bottom).log() / 2 / 48
        loss = sum(ce(t, s) + ce(s, t) for s in (z, zv)).mean() / 4
        sgd(theta, loss + contrast, momentum)
        teacher = follow()
    same(a, theta)


def test_rmt_replays_a_source_batch_beside_the_stream(batches, source, ready):
    side = {"source_x": source().x, "source_y": source().y}
    with_it, without = (ready(RMT(warmup=0, replay=r, lr=0.1)) for r in (1.0, 0.0))
    for a in (with_it, without):
        a(batches()[0], side)
    assert not torch.equal(with_it.parameters[0], without.parameters[0])


def test_equal_prototypes_repel_each_other_or_not():
    u = torch.randn(2, 3, 4, dtype=torch.float64)
    u[1, 0] = u[0, 0]
    near = torch.tensor([2, 2])
    skip = same_prototype(near, 3)
    assert skip.nonzero().tolist() == [[0, 0], [0, 3], [3, 0], [3, 3]]
    assert view_contrast(u, 0.1, skip) < view_contrast(u, 0.1)


def test_santa_is_its_formula(net, batches, ready):
    a = ready(SANTA(lr=0.1, optimizer="sgd", contrast=0.0, width=0))
    theta, momentum, start = norm_only(leaves(net())), {}, leaves(net())
    g = torch.Generator()
    g.set_state(a.generator.get_state())
    for x in batches(2):
        v = x + 0.1 * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=g).to(x)
        z, zv, z0 = forward(theta, x)[1], forward(theta, v)[1], forward(start, x)[1].detach()
        assert torch.allclose(a(x), z)
        sgd(theta, (ce(z, z0) + ce(zv, z0)).mean() / 2, momentum)
    same(a, theta)
    b = ready(SANTA(lr=0.1))
    b(batches()[0])
    assert all(not torch.equal(p, q) for p, q in zip(b.parameters, b._start["parameters"], strict=True))


def naive_place(memory, item, capacity, classes):
    """RoTTA's algorithm 1 on lists a class."""
    def score(m):
        return 1 / (1 + math.exp(-m[2] / capacity)) + m[1] / math.log(classes)

    label = item[0]
    size, total = len(memory[label]), sum(map(len, memory))
    if size < capacity / classes:
        if total < capacity:
            memory[label].append(item)
            return
        top = max(map(len, memory))
        among = [c for c in range(classes) if len(memory[c]) == top]
    else:
        among = [label]
    c, worst = max(((c, m) for c in among for m in memory[c]), key=lambda cm: score(cm[1]))
    if score(worst) > score(item):
        memory[c].remove(worst)
        memory[label].append(item)


@pytest.mark.parametrize("capacity", [7, 2])
def test_rotta_fills_its_memory_as_the_algorithm_says(capacity):
    rng, classes = np.random.default_rng(0), 3
    mine, naive = [], [[] for _ in range(classes)]
    for _ in range(200):
        label, u = int(rng.choice(3, p=[0.7, 0.2, 0.1])), float(rng.uniform(0, math.log(3)))
        where = place(mine, label, u, capacity, classes)
        if where is not None:
            mine[where : where + 1] = [{"label": label, "uncertainty": u, "age": 0}]
        naive_place(naive, [label, u, 0], capacity, classes)
        for m in mine:
            m["age"] += 1
        for m in (m for c in naive for m in c):
            m[2] += 1
        found = sorted((m["label"], m["uncertainty"], m["age"]) for m in mine)
        assert found == sorted(tuple(m) for c in naive for m in c)
    assert len(mine) == capacity


def test_rotta_is_its_formula(net, batches, ready):
    a = ready(RoTTA(lr=0.1, optimizer="sgd", rate=0.3, momentum=0.7, capacity=16, every=16))
    model, g, x = net(), torch.Generator().manual_seed(0), batches()[0]
    z = a(x)
    assert torch.allclose(z, model(x))  # the teacher with stored statistics
    ages = torch.tensor([m["age"] for m in a.state["items"]])
    memory = torch.stack(a.state["inputs"])
    theta, momentum = norm_only(leaves(model)), {}

    def robust(x):
        h = x @ theta["0.weight"].T + theta["0.bias"]
        mean = 0.7 * model[1].running_mean + 0.3 * h.mean(0)
        var = 0.7 * model[1].running_var + 0.3 * h.var(0, correction=0)
        h = ((h - mean) / (var + 1e-5).sqrt() * theta["1.weight"] + theta["1.bias"]).clamp_min(0)
        return h @ theta["3.weight"].T + theta["3.bias"], mean

    v = memory + 0.1 * memory.std(1, correction=0, keepdim=True) * torch.randn(memory.shape, generator=g).to(x)
    t, mean = robust(memory)
    w = [math.exp(-float(n) / 16) / (1 + math.exp(-float(n) / 16)) for n in ages]
    each = ce(t.detach(), robust(v)[0])
    sgd(theta, sum(w[i] * each[i] for i in range(len(w))) / len(w), momentum)
    same(a, theta)
    teacher = a.extra["teacher"].copies[0]
    assert torch.allclose(teacher[1].norm.running_mean, mean)
    assert torch.allclose(teacher[1].norm.weight, 0.7 * model[1].weight + 0.3 * theta["1.weight"])
    assert a.updates == 1


def test_memo_is_its_formula(net, batches, ready):
    a, x, g = ready(MEMO(lr=0.1, views=4, source_weight=1.0)), batches()[0], torch.Generator().manual_seed(0)
    out = a(x[:3])
    for i in range(3):
        model = net()
        one = x[i : i + 1].expand(4, 4)
        v = one + 0.1 * one.std(1, correction=0, keepdim=True) * torch.randn(one.shape, generator=g).to(x)
        p = soft(model(v)).mean(0)
        grads = torch.autograd.grad(-(p * p.log()).sum(), list(model.parameters()))
        with torch.no_grad():
            for q, d in zip(model.parameters(), grads, strict=True):
                q -= 0.1 * d
            assert torch.allclose(out[i], model(x[i : i + 1])[0])
    same(a, dict(net().named_parameters()))


def test_petal_is_its_formula(net, batches, ready):
    a = ready(PETAL(lr=0.1, optimizer="sgd", threshold=0.0, momentum=0.7, prior=1e-5, share=0.4, batch_size=16))
    theta, momentum = leaves(net()), {}
    start = {n: p.detach().clone() for n, p in theta.items()}
    mean, var = a.prepared["mean"], a.prepared["variance"]
    assert all((v >= 0).all() and v.max() > 0 for v in var)
    same(a, start)  # the net is the source model again
    teacher = copy.deepcopy(start)
    for x in batches(2):
        z, t = forward(theta, x)[1], forward(teacher, x)[1]
        assert torch.allclose(a(x), t)
        far = sum(((p - m) ** 2 / (v + 1e-6)).sum() for p, m, v in zip(theta.values(), mean, var, strict=True))
        loss = ce(t, z).mean() + 1e-5 / 2 * far
        grads = torch.autograd.grad(loss, list(theta.values()), retain_graph=True)
        sgd(theta, loss, momentum)
        teacher = {n: 0.7 * t + 0.3 * theta[n].detach() for n, t in teacher.items()}
        limit = np.quantile(np.concatenate([(d**2).numpy().ravel() for d in grads]), 0.4)
        for (n, p), d in zip(theta.items(), grads, strict=True):
            p.data.copy_(torch.where(d**2 < limit, start[n], p.data))
    same(a, theta)
    values = torch.rand(101)
    for share in (0.0, 0.03, 0.5, 0.999):
        assert float(quantile([values[:50], values[50:]], share)) == pytest.approx(np.quantile(values, share))


def test_petal_posterior_is_the_moments_along_the_training(net, source):
    a = Adapter(net(), PETAL(epochs=2, source_lr=0.1, batch_size=48))
    a.prepare(source())
    theta, momentum, seen, g = leaves(net()), {}, [], torch.Generator().manual_seed(0)
    for _ in range(2):
        order = torch.randperm(48, generator=g)
        loss = nn.functional.cross_entropy(forward(theta, source().x[order])[1], source().y[order])
        decay = 5e-4 / 2 * sum((p**2).sum() for p in theta.values())
        sgd(theta, loss + decay, momentum)
        seen.append(theta["3.weight"].detach().clone())
    assert torch.allclose(a.prepared["mean"][4], torch.stack(seen).mean(0))
    assert torch.allclose(a.prepared["variance"][4], torch.stack(seen).var(0, correction=0))


def test_adacontrast_pieces_are_their_formulas(batches, ready):
    g = torch.Generator().manual_seed(0)
    f, bank, probs = torch.randn(5, 4, generator=g), torch.randn(9, 4, generator=g), torch.rand(9, 3, generator=g)
    found = neighbour_labels(f, bank, probs, 4)
    q, k, queue = (nn.functional.normalize(v, dim=1).double() for v in (f, f + 0.5, bank))
    y, seen, loss = torch.arange(5) % 3, torch.arange(9) % 3, 0.0
    for i in range(5):
        near = sorted(range(9), key=lambda j: -float(f[i] @ bank[j] / bank[j].norm()))[:4]
        assert int(found[i]) == int(sum(probs[j] for j in near).argmax())
        own = math.exp(float(q[i] @ k[i]) / 0.07)
        bottom = own + sum(math.exp(float(q[i] @ queue[j]) / 0.07) for j in range(9) if seen[j] != y[i])
        loss -= math.log(own / bottom) / 5
    assert float(instance_contrast(q, k, queue, y, seen)) == pytest.approx(loss)
    a = ready(AdaContrast(lr=0.1, refine_after=20, queue=40, statistics="source"))
    start = [p.detach().clone() for p in a.parameters]
    for x in batches(4):
        out = a(x)
    assert len(a.state["queue"]) == len(a.state["bank"]) == 40
    assert torch.equal(out, a.net(x))  # after the update
    assert all(not torch.equal(p, q) for p, q in zip(a.parameters, start, strict=True))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("make", [augmix_view, crop_view, strong_view])
def test_views_are_pixels_of_the_given_generator(make, channels):
    x, before = torch.rand(3, channels, 16, 16), torch.get_rng_state()
    one, again, other = (make(x, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == x.shape
    assert -1e-6 <= one.min() <= one.max() <= 1 + 1e-6
    assert torch.equal(torch.get_rng_state(), before)
