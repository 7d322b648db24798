"""MCD against its equations, one entry at a time, and its three steps against steps written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from uda_adversarial import MCD, MCDPhases

import uda
from uda.testing import check_plugin


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def affine(layer, x: torch.Tensor) -> list[list[float]]:
    """``x W^T + b`` in plain loops."""
    w, b = layer.linear.weight.tolist(), layer.linear.bias.tolist()
    return [[sum(a * c for a, c in zip(row, wk, strict=True)) + bk for wk, bk in zip(w, b, strict=True)]
            for row in x.tolist()]  # fmt: skip


def gap_of(one, two) -> float:
    pairs = [(softmax(a), softmax(b)) for a, b in zip(one, two, strict=True)]
    return sum(abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True)) / (len(one) * len(one[0]))


def balance_of(logits) -> float:
    rows = [softmax(z) for z in logits]
    means = [sum(p[c] for p in rows) / len(rows) for c in range(len(rows[0]))]
    return -sum(math.log(m) for m in means) / len(means)


def test_objectives(make_step):
    plugin = MCD(weight=0.7, balance=0.2)
    model, step = make_step({"align": plugin})
    got = {k: float(v.detach()) for k, v in plugin.align_features(step).items()}
    x, y, xt = step.source.x, step.source.y.tolist(), step.target.x
    rows = [softmax(z) for z in affine(plugin.second, x)]
    assert got["second"] == pytest.approx(-sum(math.log(p[k]) for p, k in zip(rows, y, strict=True)) / 6, rel=1e-5)
    one, two = affine(model.head, xt), affine(plugin.second, xt)
    assert got["discrepancy"] == pytest.approx(-0.7 * gap_of(one, two), rel=1e-5)
    assert got["balance"] == pytest.approx(0.2 * (balance_of(one) + balance_of(two)), rel=1e-5)
    assert got.keys() == {"second", "discrepancy", "balance"}


def test_classifiers_ascend_and_features_descend(make_step):
    """The gradient on the classifiers is that of -d, on the features that of +d, times the coefficient."""
    plugin = MCD(weight=1.0, reversal=0.6, ramp="linear")
    model, step = make_step({"align": plugin}, progress=0.5)
    features = step.target.x.clone().requires_grad_()
    step.target.features = features
    heads = [*model.head.parameters(), *plugin.second.parameters()]
    got = torch.autograd.grad(plugin.align_features(step)["discrepancy"], [features, *heads])
    w1, b1, w2, b2 = (p.detach().double().requires_grad_() for p in heads)
    leaf = features.detach().double().requires_grad_()
    total = sum(
        (a.exp() / a.exp().sum() - c.exp() / c.exp().sum()).abs().sum()
        for a, c in ((w1 @ f + b1, w2 @ f + b2) for f in leaf)
    ) / (5 * 3)
    plain = torch.autograd.grad(total, [leaf, w1, b1, w2, b2])
    torch.testing.assert_close(got[0].double(), 0.6 * 0.5 * plain[0], rtol=1e-4, atol=1e-7)
    for g, p in zip(got[1:], plain[1:], strict=True):
        torch.testing.assert_close(g.double(), -p, rtol=1e-4, atol=1e-7)


def test_three_steps_against_steps_written_out(make_step, by_hand):
    """A, B and C on plain tensors: encoder relu(x W^T + b), two linear classifiers, gradient steps of one rate."""
    plugin = MCDPhases(weight=0.8, repeats=3)
    model, step = make_step({"align": plugin}, bottleneck=5)
    uda.objectives.collect(model, step)
    encoder = list(model.bottleneck.parameters())
    heads = [*model.head.parameters(), *plugin.second.parameters()]
    e = [p.detach().clone().requires_grad_() for p in encoder]
    f = [p.detach().clone().requires_grad_() for p in heads]
    x, y, xt = step.source.x, step.source.y, step.target.x

    def encode(x):
        return (x @ e[0].T + e[1]).relu()

    def supervised(z):
        return F.cross_entropy(z @ f[0].T + f[1], y) + F.cross_entropy(z @ f[2].T + f[3], y)

    def gap(z):
        return ((z @ f[0].T + f[1]).softmax(1) - (z @ f[2].T + f[3]).softmax(1)).abs().mean()

    def descend(loss, parameters):
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.3 * g

    updates = by_hand(model, 0.3)
    assert plugin.optimise(step, step.objectives)
    descend(supervised(encode(x)), e + f)
    descend(supervised(encode(x).detach()) - 0.8 * gap(encode(xt).detach()), f)
    for _ in range(3):
        descend(0.8 * gap(encode(xt)), e)
    for got, expected in zip([*encoder, *heads], [*e, *f], strict=True):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    assert [u[0] for u in updates] == ["source", "classifiers", "features0", "features1", "features2"]
    assert updates[0][1] is None
    assert set(updates[1][1]) == {"head", "align"}
    assert updates[2][1] == ["bottleneck"]


def test_classifiers_part_and_features_bring_them_together(make_step, by_hand):
    plugin = MCDPhases(weight=10.0, repeats=6)
    model, step = make_step({"align": plugin}, bottleneck=8, rows=(30, 30))
    uda.objectives.collect(model, step)
    before = 10 * float(plugin.discrepancy(model, step.target.features).detach())
    updates = by_hand(model, 0.03)
    plugin.optimise(step, step.objectives)
    gaps = [loss for phase, _, loss in updates if phase.startswith("features")]
    assert gaps[0] > before
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.9 * gaps[0]


def test_deep_classifiers_replace_the_head(make_step):
    plugin = MCD(head_hidden=7, layers=2)
    model, step = make_step({"align": plugin})
    shapes = [[tuple(p.shape) for p in m.parameters()] for m in (model.head, plugin.second)]
    assert shapes[0] == shapes[1]
    assert shapes[0][0] == (7, 4)
    assert any(not torch.equal(a, b) for a, b in zip(model.head.parameters(), plugin.second.parameters(), strict=True))
    assert plugin.align_features(step)["second"] > 0
    head = model.head
    plugin.build(model)
    assert model.head is head


class WrapsTheHead(uda.Plugin):
    """Stands for network changes that put something in the place of the head."""

    @uda.hookimpl
    def build(self, model):
        if not isinstance(model.head, torch.nn.Sequential):
            model.head = torch.nn.Sequential(model.head)


def test_a_head_that_another_plugin_has_replaced_stays(make_step):
    plugin = MCD()
    model, step = make_step({"network": WrapsTheHead(), "align": plugin})
    assert isinstance(model.head, torch.nn.Sequential)
    assert plugin.align_features(step)["second"] > 0
    with pytest.raises(uda.UDAError, match="set head_hidden to 0"):
        make_step({"network": WrapsTheHead(), "align": MCD(head_hidden=4)})


def test_prediction_by_both(make_step):
    plugin = MCD(predict="mean")
    model, step = make_step({"align": plugin})
    rows = zip(affine(model.head, step.target.x), affine(plugin.second, step.target.x), strict=True)
    expected = [[(p + q) / 2 for p, q in zip(softmax(a), softmax(b), strict=True)] for a, b in rows]
    prediction = plugin.predict(model, step.target)
    assert prediction.label.tolist() == [p.index(max(p)) for p in expected]
    assert prediction.score.tolist() == pytest.approx([max(p) for p in expected], rel=1e-5)
    assert MCD().predict(model, step.target) is None


class Weighs(uda.Plugin):
    """Takes the source's classification from the shared part."""

    @uda.hookimpl
    def weigh_objectives(self, objectives):
        self.seen = list(objectives)
        return {"classification": 0.0, "align/second": 0.0}


def test_a_weigher_has_its_say_in_the_first_step(make_step, by_hand, monkeypatch):
    monkeypatch.setattr("uda.running.log_weights", lambda *_: None)
    plugin = MCDPhases(repeats=1, weight=0.0)
    model, step = make_step({"align": plugin, "weigh": Weighs()}, bottleneck=5)
    uda.objectives.collect(model, step)
    before = [p.detach().clone() for p in model.bottleneck.parameters()]
    by_hand(model, 0.3)
    assert plugin.optimise(step, step.objectives)
    assert model.plugins["weigh"].seen == ["classification", "align/second"]
    for old, new in zip(before, model.bottleneck.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old)


def test_other_objectives_train_in_the_first_step(make_step, by_hand):
    plugin = MCDPhases(repeats=1)
    model, step = make_step({"align": plugin}, bottleneck=5)
    step.objectives.update(copy.copy(plugin.align_features(step)) | {"refine/x": torch.tensor(2.0)})
    step.objectives["align/discrepancy"] = step.objectives.pop("discrepancy")
    updates = by_hand(model, 0.0)
    plugin.optimise(step, step.objectives)
    second = float(step.objectives["second"].detach())
    assert updates[0][2] == pytest.approx(second + 2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("cls", "arguments", "text"),
    [
        (MCD, {"weight": -1.0}, "must not be negative"),
        (MCD, {"predict": "both"}, "unknown predict.*main, mean"),
        (MCD, {"ramp": "linaer"}, "'linear'"),
        (MCD, {"head_hidden": -1}, "head_hidden"),
        (MCDPhases, {"repeats": 0}, "repeats must be 1 or more"),
    ],
)
def test_bad_arguments_are_refused(cls, arguments, text):
    with pytest.raises(uda.UDAError, match=text):
        cls(**arguments)


CASES = [(MCD, {"head_hidden": 8, "balance": 0.01}), (MCDPhases, {"repeats": 2, "predict": "mean"})]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "init_args"), CASES, ids=["MCD", "MCDPhases"])
def test_plugin(cls, init_args):
    report = check_plugin(cls, init_args=init_args, ddp=False)
    assert {"second", "discrepancy"} <= set(report.objectives)
    assert not report.warnings
