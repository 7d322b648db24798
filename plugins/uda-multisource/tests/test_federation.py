"""Joined updates against loops, and a federation that learns from few target labels."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from uda_multisource.aggregation import auto_beta, joined, projected
from uda_multisource.federation import Federation

import uda


def updates(seed, n):
    draw = np.random.default_rng(seed)
    return [{"a": torch.tensor(draw.normal(size=(2, 3))), "b": torch.tensor(draw.normal(size=4))} for _ in range(n)]


def test_joined_updates_by_loops():
    target, *sources = updates(0, 3)
    for rule in ("fedavg", "fedda", "fedgp"):
        got = joined(target, sources, [3, 1], [0.3, 0.8], rule)
        for k, t in target.items():
            t, value = t.numpy(), 0.0
            for s, a, b in zip(sources, (0.75, 0.25), (0.3, 0.8), strict=True):
                g = s[k].numpy()
                if rule == "fedavg":
                    value = value + a * g
                    continue
                if rule == "fedgp":
                    g = max((t * g).sum(), 0) / (g**2).sum() * g
                value = value + a * ((1 - b) * t + b * g)
            np.testing.assert_allclose(got[k], value, rtol=1e-9)
    assert projected(torch.tensor([1.0, 0]), torch.tensor([-2.0, 1])).tolist() == [0, 0]
    torch.testing.assert_close(projected(torch.tensor([1.0, 1]), torch.tensor([4.0, 0])), torch.tensor([1.0, 0]))


def test_auto_beta_by_loops():
    target, source = updates(1, 4), updates(2, 1)[0]
    g = [np.concatenate([u["a"].numpy().ravel(), u["b"].numpy()]) for u in target]
    s, mean, m = np.concatenate([source["a"].numpy().ravel(), source["b"].numpy()]), sum(g) / 4, 10
    var = sum(((v - mean) ** 2).sum() for v in g) / 3 / m
    d2 = max(sum(((v - s) ** 2).sum() for v in g) / 4 / m - var, 0)
    assert auto_beta(target, source, "fedda") == pytest.approx(var / 4 / (var / 4 + d2))
    rest = [v - (v @ s) / (s @ s) * s for v in g]
    centre = sum(rest) / 4
    own = sum(((v - centre) ** 2).sum() for v in rest) / 3 / m
    q = max(sum((v**2).sum() for v in rest) / 4 / m - own, 0)
    assert auto_beta(target, source, "fedgp") == pytest.approx(var / 4 / (var / 4 + q))


def test_a_source_that_agrees_counts_and_one_that_does_not_does_not():
    torch.manual_seed(0)
    truth = torch.ones(50)
    target = [{"a": truth + torch.randn(50)} for _ in range(6)]
    good, bad = {"a": truth + 0.01}, {"a": -3 * truth + torch.randn(50)}
    assert auto_beta(target, good, "fedda") > 0.5 > auto_beta(target, bad, "fedda")
    assert auto_beta(target, {"a": 5 * truth}, "fedgp") > auto_beta(target, {"a": 5 * truth}, "fedda")  # too long


def domain(shift, n, seed, flip=False):
    torch.manual_seed(seed)
    y = torch.arange(n) % 2
    x = torch.randn(n, 4) * 0.7 + (2.0 * y[:, None] - 1) * torch.tensor([1.0, 1, 0, 0]) + shift
    return x, 1 - y if flip else y


def passes(x, y, size=10):
    return lambda: zip(x.split(size), y.split(size), strict=True)


@pytest.mark.parametrize("beta", [0.5, "auto"])
def test_federation_ignores_a_source_of_other_labels(beta):
    """FedGP keeps what the few labels of the target agree with; averaging the sources does not."""
    good, bad = domain(0.3, 60, 1), domain(0.0, 60, 2, flip=True)
    few, test = domain(0.0, 20, 3), domain(0.0, 400, 4)

    def accuracy(rule):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        run = Federation(net, [passes(*good), passes(*bad)], passes(*few),
                         lambda p: torch.optim.SGD(p, 0.1), rule=rule, beta=beta)  # fmt: skip
        with torch.no_grad():
            return float((run.run(15)(test[0]).argmax(1) == test[1]).float().mean()), run

    average, _ = accuracy("fedavg")
    found, run = accuracy("fedgp")
    assert found > 0.9
    assert found > average + 0.05
    assert len(run.betas) == 15


def test_a_round_by_hand_and_buffers():
    """One round is start + joined differences; counters of BatchNorm are the target's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    one, few = domain(0.3, 20, 1), domain(0.0, 10, 2)
    start = copy.deepcopy(net.state_dict())

    def local(x, y):
        own = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        own.load_state_dict(start)
        step = torch.optim.SGD(own.parameters(), 0.1)
        for a, b in zip(x.split(10), y.split(10), strict=True):
            step.zero_grad()
            F.cross_entropy(own(a), b).backward()
            step.step()
        return own.state_dict()

    source, target = local(*one), local(*few)
    Federation(net, [passes(*one)], passes(*few), lambda p: torch.optim.SGD(p, 0.1), rule="fedda", beta=0.3).round()
    for k, v in net.state_dict().items():
        if v.is_floating_point():
            torch.testing.assert_close(v, start[k] + 0.7 * (target[k] - start[k]) + 0.3 * (source[k] - start[k]))
        else:
            assert int(v) == 1


def test_bad_input():
    net = nn.Linear(4, 2)
    few = passes(*domain(0.0, 10, 2))

    def sgd(p):
        return torch.optim.SGD(p, 0.1)

    with pytest.raises(uda.UDAError, match="one source or more"):
        Federation(net, [], few, sgd)
    with pytest.raises(uda.UDAError, match="'fedgp'"):
        Federation(net, [few], few, sgd, rule="fedpg")
    with pytest.raises(uda.UDAError, match="share in"):
        Federation(net, [few], few, sgd, beta=2.0)
    with pytest.raises(uda.UDAError, match="needs labelled target samples"):
        Federation(net, [few], lambda: iter(()), sgd).round()
    with pytest.raises(uda.UDAError, match="two target batches"):
        Federation(net, [few], few, sgd, beta="auto").round()
