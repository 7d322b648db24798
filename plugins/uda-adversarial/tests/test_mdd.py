"""MDD against its equations, one sample at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from uda_adversarial import MDD
from uda_adversarial.mdd import log_complement, margin_disparity

import uda
from uda.testing import check_plugin


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def disparity(source, target, y_source, y_target, margin) -> float:
    on_source = [-log_softmax(z)[y] for z, y in zip(source, y_source, strict=True)]
    on_target = [math.log(1 - math.exp(log_softmax(z)[y])) for z, y in zip(target, y_target, strict=True)]
    return margin * float(np.mean(on_source)) - float(np.mean(on_target))


def test_against_loops():
    random = np.random.default_rng(0)
    source, target = 2 * random.normal(size=(6, 3)), 2 * random.normal(size=(5, 3))
    ys, yt = random.integers(0, 3, 6), random.integers(0, 3, 5)
    got = margin_disparity(*map(torch.tensor, (source, target, ys, yt)), margin=4.0)
    assert float(got) == pytest.approx(disparity(source, target, ys, yt, 4.0), rel=1e-12)


def test_log_complement_where_the_class_is_certain():
    """``log(1 - p)`` is about ``-z`` for a class that leads by z, and its gradient is -1."""
    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    value = log_complement(logits, torch.tensor([0, 0]))
    assert value.tolist() == pytest.approx([math.log(2) - 200, math.log(2 / 3)], rel=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), [logits])
    torch.testing.assert_close(grad[0], torch.tensor([-1.0, 0.5, 0.5]))
    assert grad.isfinite().all()


def test_objective_and_whom_its_gradient_reaches(make_step):
    """The auxiliary classifier descends, the features ascend by the coefficient, the main classifier gets nothing."""
    plugin = MDD(weight=0.5, margin=3.0, reversal=0.4)
    model, step = make_step({"align": plugin}, progress=0.2)
    fs, ft = step.source.x.clone().requires_grad_(), step.target.x.clone().requires_grad_()
    step.source.features, step.target.features = fs, ft
    loss = plugin.align_features(step)["disparity"]
    own, main = list(plugin.second.parameters()), list(model.head.parameters())
    got = torch.autograd.grad(loss, [fs, ft, *own, *main], allow_unused=True)
    assert got[-1] is None
    assert got[-2] is None
    w, b = (p.detach().double().requires_grad_() for p in own)
    ls, lt = fs.detach().double().requires_grad_(), ft.detach().double().requires_grad_()
    h, c = (p.detach().double() for p in main)
    ys, yt = ((x @ h.T + c).max(1).indices for x in (ls, lt))
    expected = 0.0
    for f, y in zip(ls, ys, strict=True):
        z = w @ f + b
        expected = expected - 3.0 * torch.log(z[y].exp() / z.exp().sum()) / len(ls)
    for f, y in zip(lt, yt, strict=True):
        z = w @ f + b
        expected = expected - torch.log(1 - z[y].exp() / z.exp().sum()) / len(lt)
    expected = 0.5 * expected
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    plain = torch.autograd.grad(expected, [ls, lt, w, b])
    coefficient = 0.4 * (2 / (1 + math.exp(-10 * 0.2)) - 1)
    for g, p, factor in zip(got, plain, (-coefficient, -coefficient, 1.0, 1.0), strict=False):
        torch.testing.assert_close(g.double(), factor * p, rtol=1e-4, atol=1e-7)


def test_the_auxiliary_classifier_agrees_on_the_source_and_not_on_the_target(make_step):
    plugin = MDD()
    model, step = make_step({"align": plugin}, rows=(60, 60))
    step.target.x = step.target.x + 4
    for _ in range(300):
        again = model.again(step, collect=False)
        grads = torch.autograd.grad(plugin.align_features(again)["disparity"], list(plugin.second.parameters()))
        with torch.no_grad():
            for p, g in zip(plugin.second.parameters(), grads, strict=True):
                p -= 0.5 * g
    agree = [(plugin.second(b.x).argmax(1) == b.logits.argmax(1)).float().mean() for b in (step.source, step.target)]
    assert agree[0] > 0.7
    assert agree[1] < 0.2


def test_bad_arguments_are_refused():
    with pytest.raises(uda.UDAError, match="margin must be positive"):
        MDD(margin=0.0)
    with pytest.raises(uda.UDAError, match="dropout"):
        MDD(dropout=1.0)


@pytest.mark.slow
def test_plugin():
    report = check_plugin(MDD, init_args={"head_hidden": 8}, ddp=False)
    assert report.objectives == ["disparity"]
    assert not report.warnings
