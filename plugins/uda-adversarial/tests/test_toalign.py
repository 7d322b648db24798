"""ToAlign against its equations, one entry at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from uda_adversarial import ToAlign
from uda_adversarial.toalign import task_relevant, task_weights

from uda.testing import check_plugin


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max())
    return e / e.sum()


def decomposed(features: np.ndarray, w: np.ndarray) -> np.ndarray:
    """``s f * w``, one sample at a time."""
    rows = []
    for f, v in zip(features, w, strict=True):
        product = [a * b for a, b in zip(f, v, strict=True)]
        scale = math.sqrt(sum(a * a for a in f) / sum(p * p for p in product))
        rows.append([scale * p for p in product])
    return np.array(rows)


def bce(logits: np.ndarray, label: float, probs: np.ndarray | None) -> float:
    weights = np.ones(len(logits))
    if probs is not None:
        weights = np.array([1 + math.exp(sum(q * math.log(q) for q in p)) for p in probs])
    p = 1 / (1 + np.exp(-logits))
    losses = -(label * np.log(p) + (1 - label) * np.log(1 - p))
    return float((weights * losses).sum() / weights.sum())


@pytest.mark.parametrize("predictions", [True, False])
@pytest.mark.parametrize("entropy", [True, False])
def test_objective(make_step, predictions, entropy):
    plugin = ToAlign(predictions=predictions, entropy=entropy, hidden=5, layers=1, batch_norm=False, weight=0.4)
    model, step = make_step({"align": plugin})
    w, b = (p.detach().double().numpy() for p in model.head.parameters())
    xs, xt, y = step.source.x.double().numpy(), step.target.x.double().numpy(), step.source.y.numpy()
    positive = decomposed(xs, w[y])
    probs = [np.array([softmax(w @ f + b) for f in x]) for x in (positive, xt)]
    seen = probs if predictions else [positive, xt]
    one, two = (m for m in plugin.discriminator.net if isinstance(m, nn.Linear))
    (w1, b1), (w2, b2) = ([p.detach().double().numpy() for p in m.parameters()] for m in (one, two))
    zs, zt = (np.maximum(x @ w1.T + b1, 0) @ w2[0] + b2[0] for x in seen)
    weights = probs if entropy else [None, None]
    expected = 0.4 * 0.5 * (bce(zs, 1.0, weights[0]) + bce(zt, 0.0, weights[1]))
    assert float(plugin.align_features(step)["domain"].detach()) == pytest.approx(expected, rel=1e-4)


def test_weights_are_the_classifier_of_the_true_class(make_step):
    model, step = make_step({"align": ToAlign(hidden=4)})
    w = task_weights(model.head, step.source.x, step.source.y)
    torch.testing.assert_close(w, model.head.linear.weight[step.source.y])
    assert not w.requires_grad
    soft = torch.rand(6, 3).softmax(1)
    torch.testing.assert_close(task_weights(model.head, step.source.x, soft), soft @ model.head.linear.weight)


def test_of_a_deep_head_they_are_the_slope_of_its_logit():
    head = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y, h = torch.randn(2, 4, dtype=torch.float64), torch.tensor([2, 0]), 1e-6
    w = task_weights(head, x, y)
    for i in range(2):
        for j in range(4):
            up, down = x[i].clone(), x[i].clone()
            up[j] += h
            down[j] -= h
            slope = float((head(up)[y[i]] - head(down)[y[i]]).detach()) / (2 * h)
            assert float(w[i, j]) == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_energy_stays_and_what_the_task_ignores_goes():
    f, w = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    w[:, 2] = 0
    part = task_relevant(f, w)
    torch.testing.assert_close(part.norm(dim=1), f.norm(dim=1))
    assert bool((part[:, 2] == 0).all())
    assert bool((part[:, :2].sign() == (f * w)[:, :2].sign()).all())


def test_nothing_relevant_gives_zero_and_a_finite_gradient():
    f = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]], requires_grad=True)
    part = task_relevant(f, torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]))
    assert part.tolist() == [[0, 0], [0, 0], [1, 2]]
    (grad,) = torch.autograd.grad(part.sum(), [f])
    assert grad.isfinite().all()


@pytest.mark.parametrize("predictions", [True, False])
def test_whom_the_gradient_reaches(make_step, predictions):
    plugin = ToAlign(predictions=predictions, hidden=5)
    model, step = make_step({"align": plugin})
    fs = step.source.x.clone().requires_grad_()
    step.source.features = fs
    loss = plugin.align_features(step)["domain"]
    gf, gh = torch.autograd.grad(loss, [fs, model.head.linear.weight], allow_unused=True)
    assert gf.abs().max() > 0
    assert (gh is not None) == predictions


def test_a_constant_scale_changes_the_gradient_only():
    f, w = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    one, two = task_relevant(f, w), task_relevant(f, w, detach_scale=True)
    torch.testing.assert_close(one, two)
    grads = [torch.autograd.grad(v.sum(), [f])[0] for v in (one, two)]
    torch.testing.assert_close(grads[1], (two / f).detach())
    assert not torch.allclose(*grads)


@pytest.mark.slow
def test_plugin():
    report = check_plugin(ToAlign, init_args={"hidden": 16}, ddp=False)
    assert report.objectives == ["domain"]
    assert not report.warnings
