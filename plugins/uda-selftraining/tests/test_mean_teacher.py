"""Mean teacher against the equations of its two papers, written a second time with numpy."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from uda_selftraining import FixMatch, MeanTeacher
from uda_selftraining.mean_teacher import class_balance_loss, consistency_loss

import uda
from uda.testing import check_plugin


def probs(seed, n=10, classes=4, scale=2.0):
    draw = np.random.default_rng(seed)
    z = np.exp(scale * draw.normal(size=(n, classes)))
    return z / z.sum(1, keepdims=True)


def bce(p, t):
    return -(t * np.log(p + 1e-6) + (1 - t) * np.log(1 - p + 1e-6))


@pytest.mark.parametrize("threshold", [0.0, 0.7])
@pytest.mark.parametrize("loss", ["mse", "bce"])
def test_consistency_against_numpy(loss, threshold):
    s, t = probs(0), probs(1)
    expected = 0.0
    for i in range(10):
        if max(t[i]) > threshold:
            each = [(a - b) ** 2 if loss == "mse" else bce(a, b) for a, b in zip(s[i], t[i], strict=True)]
            expected += sum(each) / 4 / 10
    keep = torch.tensor(t).max(1).values > threshold
    student, teacher = (torch.tensor(v, requires_grad=True) for v in (s, t))
    value = consistency_loss(student, teacher, keep, loss)
    assert value.item() == pytest.approx(expected, rel=1e-9)
    of_student, of_teacher = torch.autograd.grad(value, [student, teacher], allow_unused=True)
    assert of_teacher is None
    if loss == "mse":
        np.testing.assert_allclose(of_student.numpy(), 2 * (s - t) * keep.numpy()[:, None] / 40, rtol=1e-9)


def test_class_balance_against_numpy():
    s = probs(2)
    expected = sum(bce(s[:, c].mean(), 0.25) for c in range(4))
    assert float(class_balance_loss(torch.tensor(s))) == pytest.approx(expected, rel=1e-9)
    even = torch.full((6, 4), 0.25, dtype=torch.float64)
    for other in (torch.eye(4, dtype=torch.float64)[[0, 0, 1]], torch.tensor(s)):
        assert float(class_balance_loss(other)) > float(class_balance_loss(even))


def test_descent_agrees_with_the_teacher_and_balances():
    torch.manual_seed(0)
    logits, teacher = torch.randn(40, 3, requires_grad=True), torch.eye(3)[torch.randint(0, 3, (40,))]
    shifted = torch.randn(40, 3) + torch.tensor([3.0, 0.0, 0.0])
    balanced = shifted.clone().requires_grad_()
    for _ in range(60):
        loss = 40 * consistency_loss(logits.softmax(1), teacher) + class_balance_loss(balanced.softmax(1))
        grads = torch.autograd.grad(loss, [logits, balanced])
        logits, balanced = ((v - g).detach().requires_grad_() for v, g in zip((logits, balanced), grads, strict=True))
    assert (logits.argmax(1) == teacher.argmax(1)).float().mean() > 0.95
    assert balanced.softmax(1).mean(0).max() < shifted.softmax(1).mean(0).max()


# ------------------------------------------------------------------------------------------- in a model


def make(backbone=None, plugins=None, **init_args):
    torch.manual_seed(0)
    plugins = {"t": MeanTeacher(**{"threshold": 0.0, **init_args}), **(plugins or {})}
    model = uda.UDA(
        backbone or nn.Linear(6, 7), plugins, bottleneck=5, num_classes=3, input_shape=[6], forward_mode="separate"
    )
    return model.train()


def make_step(model, index=0, progress=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 6, generator=g)
    target = {"x": x, "weak": x + 0.1, "strong": x + torch.randn(16, 6, generator=g), "index": torch.arange(16)}
    source = {"x": x, "y": torch.zeros(16).long()}
    step = uda.Step(model, {"sources": {"s": source}, "target": target}, progress, 0, index)
    model.hooks.all("prepare_batch", step=step)
    return step


def test_objectives_of_a_step():
    model = make(weight=2.0, balance=0.1, threshold=0.4)
    step = make_step(model)
    student = step.target.view("strong").logits.detach().double().softmax(1).numpy()
    reference = copy.deepcopy(nn.Sequential(model.backbone, model.bottleneck, model.head)).train()
    teacher = reference(step.target.view("weak").x).detach().double().softmax(1).numpy()  # statistics of the batch
    keep = teacher.max(1) > 0.4
    assert 0 < keep.sum() < 16
    found = model.plugins["t"].refine_classifier(step)
    mse = (((student - teacher) ** 2).mean(1) * keep).mean()
    balance = sum(bce(student[:, c].mean(), 1 / 3) for c in range(3)) * keep.mean()
    assert float(found["consistency"]) == pytest.approx(2.0 * mse, rel=1e-4)
    assert float(found["balance"]) == pytest.approx(0.2 * balance, rel=1e-4)
    assert not any(p.requires_grad for p in model.plugins["t"].parameters())


@pytest.mark.parametrize(("progress", "factor"), [(0.0, math.exp(-5)), (0.1, math.exp(-1.25)), (0.2, 1.0), (0.9, 1.0)])
def test_ramp(progress, factor):
    plain, ramped = make(balance=0.0), make(balance=0.0, ramp_up=0.2)
    values = [m.plugins["t"].refine_classifier(make_step(m, progress=progress))["consistency"] for m in (plain, ramped)]
    assert float(values[1]) == pytest.approx(factor * float(values[0]), rel=1e-5)


@pytest.mark.parametrize("warm", [False, True])
def test_the_teacher_follows(warm):
    model = make(momentum=0.9, warm_momentum=warm)
    plugin = model.plugins["t"]
    make_step(model)
    expected = [p.detach().clone().double().numpy() for p in model.head.parameters()]
    for n in range(4):
        with torch.no_grad():
            for p in model.head.parameters():
                p.add_(1.0)
        step = SimpleNamespace(model=model, index=n, updated=n != 2)
        plugin.after_step(step)
        if n != 2:  # no optimiser step: the teacher stays
            m = min(0.9, 1 - 1 / (n + 1)) if warm else 0.9
            students = [p.detach().double().numpy() for p in model.head.parameters()]
            expected = [m * e + (1 - m) * s for e, s in zip(expected, students, strict=True)]
    for got, want in zip(plugin.teacher.copies[2].parameters(), expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


def test_the_teacher_starts_from_loaded_weights():
    """Weights that come after the model was made, as with ``init_from``, are the teacher's start as well."""
    model = make()
    with torch.no_grad():
        model.head.linear.bias.add_(3.0)
        model.bottleneck.net[1].running_mean.add_(2.0)
    step = make_step(model, index=5)
    teacher = model.plugins["t"].teacher
    assert not torch.equal(teacher.copies[2].linear.bias, model.head.linear.bias)
    make_step(model, index=0)
    assert torch.equal(teacher.copies[2].linear.bias, model.head.linear.bias)
    assert torch.equal(teacher.copies[1].net[1].running_mean, model.bottleneck.net[1].running_mean)
    assert step.index == 5


@pytest.mark.parametrize("statistics", ["batch", "student", "average"])
def test_statistics_of_the_teacher(statistics):
    model = make(statistics=statistics)
    plugin, step = model.plugins["t"], make_step(model)
    norm = plugin.teacher.copies[1].net[1]
    before = norm.running_mean.clone()
    logits = plugin.teacher_logits(model, step.target, "weak")
    reference = copy.deepcopy(nn.Sequential(model.backbone, model.bottleneck, model.head))
    reference.train(statistics == "batch")
    torch.testing.assert_close(logits, reference(step.target.view("weak").x).detach())
    assert torch.equal(norm.running_mean, before) == (statistics != "batch")
    assert not norm.training
    with torch.no_grad():
        model.bottleneck.net[1].running_mean.add_(1.0)
    before, student = norm.running_mean.clone(), model.bottleneck.net[1].running_mean
    plugin.after_step(SimpleNamespace(model=model, index=1, updated=True))
    expected = {"batch": before, "student": student, "average": 0.99 * before + 0.01 * student}[statistics]
    torch.testing.assert_close(norm.running_mean, expected)


class Doubled(uda.Plugin):
    """Changes features between bottleneck and classifier."""

    @uda.hookimpl
    def transform_features(self, batch, features):
        batch.cache["doubled"] = len(batch.cache)
        return 2 * features


def test_features_of_the_teacher_are_transformed_too():
    model = make(plugins={"d": Doubled()}, statistics="student")
    step = make_step(model)
    backbone, bottleneck, head = model.plugins["t"].teacher.copies
    x = step.target.view("weak").x
    torch.testing.assert_close(
        model.plugins["t"].teacher_logits(model, step.target, "weak"), head(2 * bottleneck(backbone(x)))
    )
    assert "doubled" not in step.target.cache  # the student's own intermediates are not overwritten


def test_the_teacher_may_label_and_predict():
    model = make(labels=True, predict="teacher", threshold=0.4, plugins={"f": FixMatch()})
    step = make_step(model)
    key, pseudo = model.hooks.first("pseudo_label", step=step)
    teacher = model.plugins["t"].teacher_logits(model, step.target, "weak").softmax(1)
    assert key == "t"
    assert torch.equal(pseudo.y, teacher.argmax(1))
    assert torch.equal(pseudo.keep, teacher.max(1).values > 0.4)
    with torch.no_grad():
        model.eval().head.linear.bias.add_(torch.tensor([100.0, 0.0, 0.0]))
        prediction = model.predict_batch(model.batch(step.target.x))
        assert len(prediction.label.unique()) > 1  # the student would say 0 throughout
        assert make().plugins["t"].predict(model, model.batch(step.target.x)) is None
    assert make().hooks.first("pseudo_label", step=step) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"loss": "kl"}, "unknown loss.*bce, mse"), ({"statistics": "own"}, "average, batch, student"),
        ({"predict": "both"}, "unknown predict"), ({"student_view": "plain"}, "unknown student_view.*strong, weak, x"),
        ({"threshold": 1.0}, "threshold"), ({"momentum": 1.1}, "momentum"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(uda.UDAError, match=text):
        MeanTeacher(**arguments)


CASES = [
    (MeanTeacher, {"init_args": {"threshold": 0.3}}),
    (MeanTeacher, {"init_args": {"threshold": 0.0, "statistics": "average", "ramp_up": 0.5, "warm_momentum": True,
                                 "labels": True, "predict": "teacher", "balance": 0.0}}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "given"), CASES, ids=["French", "Tarvainen"])
def test_plugin(cls, given):
    assert not check_plugin(cls, ddp=False, **given).warnings
