"""NOTE against loops: instance-aware normalisation, the balanced memory, its update, the training on the source."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, Source, SourceSamples
from uda_testtime.note import NOTE, InstanceAwareNorm, place
from uda_testtime.rotta import learning

from uda.errors import UDAError


def images() -> nn.Module:
    torch.manual_seed(0)
    out = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    ).double()
    out(torch.randn(20, 2, 6, 6).double() + 1)
    return out.eval()


def pictures(n: int, seed: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, 6, generator=g).double() * (1 + 3 * torch.rand(n, 1, 1, 1, generator=g).double())


def naive(x, mean, var, weight, bias, k):
    """IABN, entry by entry."""
    out, shrunk = np.empty_like(x), 0
    positions = x.shape[2] * x.shape[3]
    for b in range(len(x)):
        for c in range(x.shape[1]):
            values = x[b, c].ravel()
            own = values.mean(), values.var(ddof=1)
            limits = k * math.sqrt((var[c] + 1e-5) / positions), k * (var[c] + 1e-5) * math.sqrt(2 / (positions - 1))
            used = []
            for common, mine, limit in zip((mean[c], var[c]), own, limits, strict=True):
                gap = mine - common
                shrunk += abs(gap) <= limit
                used.append(common + (0 if abs(gap) <= limit else gap - math.copysign(limit, gap)))
            out[b, c] = (x[b, c] - used[0]) / math.sqrt(max(used[1], 0) + 1e-5) * weight[c] + bias[c]
    return out, shrunk


def test_instance_aware_norm_is_its_formula():
    layer, x = images()[1], pictures(8)
    x = images()[0](x).detach()
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    old = [v.clone().numpy() for v in (layer.running_mean, layer.running_var)]
    mine = InstanceAwareNorm(layer, 0.3, 1.5)
    wanted, shrunk = naive(x.numpy(), *old, weight, bias, 1.5)
    assert 0 < shrunk < 64  # of 8 x 4 means and as many variances
    assert np.allclose(mine(x).detach(), wanted)
    with learning(mine):
        out = mine(x).detach()
    rows = x.permute(1, 0, 2, 3).flatten(1).numpy()
    mean, var = rows.mean(1), rows.var(1, ddof=1)
    assert np.allclose(out, naive(x.numpy(), mean, var, weight, bias, 1.5)[0])
    assert np.allclose(layer.running_mean, 0.7 * old[0] + 0.3 * mean)
    assert np.allclose(layer.running_var, 0.7 * old[1] + 0.3 * var)
    assert torch.allclose(InstanceAwareNorm(layer, 0.3, 1e9)(x), layer(x))
    assert not mine.learning


class NaiveMemory:
    """Lists a class, as in the paper's algorithm."""

    def __init__(self, capacity: int, classes: int) -> None:
        self.capacity, self.items, self.seen = capacity, [[] for _ in range(classes)], [0] * classes

    def add(self, name: int, label: int, draws: list[float]) -> None:
        self.seen[label] += 1
        sizes = [len(c) for c in self.items]
        if sum(sizes) >= self.capacity:
            largest = [c for c in range(len(sizes)) if sizes[c] == max(sizes)]
            if label in largest:
                if not draws[0] <= sizes[label] / self.seen[label]:
                    return
                give = label
            else:
                give = largest[math.floor(draws[1] * len(largest))]
            del self.items[give][math.floor(draws[2] * len(self.items[give]))]
        self.items[label].append(name)


@pytest.mark.parametrize("capacity", [7, 2])
def test_memory_is_balanced_over_classes_and_uniform_in_time(capacity):
    draw = random.Random(0)
    labels, names, counts, other = [], [], [0] * 3, NaiveMemory(capacity, 3)
    for i in range(150):
        label, draws = draw.choices(range(3), [0.7, 0.2, 0.1])[0], [draw.random() for _ in range(3)]
        counts[label] += 1
        where = place(labels, label, counts[label], capacity, draws)
        # by item the order within a class differs from the lists: compare which class gives up, and how many are held
        if where is not None:
            labels[where : where + 1], names[where : where + 1] = [label], [i]
        other.add(i, label, draws)
        assert [labels.count(c) for c in range(3)] == [len(c) for c in other.items]
    if capacity == 7:
        assert sorted(labels.count(c) for c in range(3)) == [2, 2, 3]
    kept = np.zeros(100)
    for trial in range(300):  # one class: a plain reservoir keeps each of 100 samples with probability 10 / 100
        draw, items = random.Random(trial), []
        for i in range(100):
            where = place([0] * len(items), 0, i + 1, 10, [draw.random() for _ in range(3)])
            if where is not None:
                items[where : where + 1] = [i]
        kept[items] += 1
    assert kept.sum() == 3000
    assert abs(kept[:50].sum() - 1500) < 4 * math.sqrt(3000 / 4)


def test_note_is_its_formula(net, batches):
    """Feature rows: IABN is BatchNorm, and the update is the entropy of the memory under its own statistics."""
    a, model, x = Adapter(net(), NOTE(lr=0.1, optimizer="sgd", rate=0.3, epochs=0, every=16)), net(), batches()[0]
    assert torch.allclose(a(x), model(x))
    gamma, beta = (p.detach().clone().requires_grad_() for p in (model[1].weight, model[1].bias))
    h = model[0](torch.stack(a.state["inputs"]))
    z = model[3](((h - h.mean(0)) / (h.var(0) + 1e-5).sqrt() * gamma + beta).relu())
    p = z.exp() / z.exp().sum(1, keepdim=True)
    grads = torch.autograd.grad(sum(-(p * p.log()).sum(1)) / 16 / 3, [gamma, beta])
    for mine, old, g in zip(a.parameters, (gamma, beta), grads, strict=True):
        assert torch.allclose(mine, old - 0.1 * g)
    assert torch.allclose(a.net[1].norm.running_mean, 0.7 * model[1].running_mean + 0.3 * h.mean(0))
    assert torch.allclose(a.net[1].norm.running_var, 0.7 * model[1].running_var + 0.3 * h.var(0))


def test_prediction_does_not_depend_on_the_size_of_batches():
    def adapter():
        return Adapter(images(), NOTE(lr=0.1, rate=0.3, epochs=0, capacity=9, every=10))

    x, a, b = pictures(48), adapter(), adapter()
    one, many = torch.cat([a(v[None]) for v in x]), torch.cat([b(x[:30]), b(x[30:])])
    assert torch.allclose(one, many)
    assert a.updates == b.updates == 4
    assert not torch.allclose(many, adapter().net(x))  # it does something


@pytest.mark.parametrize("options", [{"lr": 0, "rate": 0}, {"weight": 0, "rate": 0}])
def test_without_effect_it_is_the_source_with_the_new_layers(options, net, batches):
    a = Adapter(images(), NOTE(epochs=0, every=4, **options))
    still = Adapter(images(), NOTE(epochs=0)).net
    assert all(torch.equal(a(x), still(x)) for x in pictures(24).split(8))
    assert a.updates == 6
    a, b = Adapter(net(), NOTE(epochs=0, every=8, **options)), Adapter(net(), Source())
    assert all(torch.equal(a(x), b(x)) for x in batches())


def test_the_source_model_learns_on_with_the_new_layers(tmp_path):
    samples = SourceSamples(pictures(40, 2), torch.arange(40) % 3)
    a = Adapter(images(), NOTE(epochs=2, batch_size=20, source_lr=0.05))
    a.prepare(samples)
    model, momentum, g = images(), {}, torch.Generator().manual_seed(0)
    layer = InstanceAwareNorm(model[1], 0.1, 4.0)
    model[1] = layer
    for _ in range(2):
        for rows in torch.randperm(40, generator=g).split(20):
            with learning(model):
                z = model(samples.x[rows])
            loss = -(z.log_softmax(1)[torch.arange(20), samples.y[rows]]).mean()
            for p, d in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                v = momentum[p] = 0.9 * momentum.get(p, 0) + d
                p.data -= 0.05 * (d + 0.9 * v)  # Nesterov
    for (name, p), q in zip(a.net.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.allclose(p, q), name
    assert len(a.parameters) == 2
    assert a.updates == 0
    assert a.net[1].rate == 0.01
    a.save_prepared(tmp_path / "ready.pt")
    with pytest.raises(UDAError, match=r"source_lr: 0\.05, now 0\.001"):
        Adapter(images(), NOTE(epochs=2, batch_size=20)).load_prepared(tmp_path / "ready.pt")
    b = Adapter(images(), NOTE(epochs=2, batch_size=20, source_lr=0.05))
    b.load_prepared(tmp_path / "ready.pt")
    assert torch.equal(a(pictures(9)), b(pictures(9)))
    assert repr(a.export()) == repr(images())


def test_bad_input():
    bare = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with pytest.raises(UDAError, match="no BatchNorm"):
        Adapter(bare, NOTE())
    with pytest.raises(UDAError, match="made ready"):
        Adapter(images(), NOTE())(pictures(2))
    with pytest.raises(UDAError, match="capacity=0"):
        NOTE(capacity=0)
    assert NOTE(epochs=0).needs == "nothing"
