"""SDAT against sharpness-aware steps written out on copies of the model, beside different aligners."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from uda_adversarial import BSP, CDAN, DANN, SDAT
from uda_adversarial.sdat import ascent, moved

import uda
from uda import objectives
from uda.testing import check_plugin

SMALL = {"hidden": 5, "layers": 1, "batch_norm": False}


class Certainty(uda.Plugin):
    """A refiner of the classifier."""

    @uda.hookimpl
    def refine_classifier(self, step):
        return {"entropy": 0.3 * uda.losses.mean_entropy(step.target.logits)}


def encoder_and_head(model):
    return [*model.bottleneck.parameters(), *model.head.parameters()]


@pytest.mark.parametrize("aligner", [DANN, CDAN])
@pytest.mark.parametrize("refined", [False, True])
def test_step_against_a_copy_at_the_worst_weights(make_step, by_hand, aligner, refined):
    """e from the task alone, gradients of everything at w + e, applied at w; the discriminator is not moved."""
    refiner = {"refine": Certainty()} if refined else {}
    plugins = {"align": aligner(**SMALL), **refiner, "smooth": SDAT(rho=0.5)}
    model, step = make_step(plugins, bottleneck=5)
    objectives.prepare(model, step)
    objectives.collect(model, step)

    def task(m):
        z = [m.head(m.bottleneck(x)) for x in (step.source.x, step.target.x)]
        p = z[1].softmax(1)
        return F.cross_entropy(z[0], step.source.y) - (0.3 * (p * p.log()).sum(1).mean() if refined else 0.0)

    grads = torch.autograd.grad(task(model), encoder_and_head(model))
    norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    there = copy.deepcopy(model)
    with torch.no_grad():
        for p, g in zip(encoder_and_head(there), grads, strict=True):
            p += 0.5 * g / norm
    data = {
        "sources": {"s": {"x": step.source.x, "y": step.source.y}}, "target": {"x": step.target.x}
    }  # fmt: skip
    other = uda.Step(there, data, step.progress, 0, 0)
    objectives.collect(there, other)
    assert float(task(there).detach()) > float(task(model).detach())
    everything = [*encoder_and_head(there), *there.plugins["align"].parameters()]
    expected = torch.autograd.grad(sum(other.objectives.values()), everything)
    mine = [*encoder_and_head(model), *model.plugins["align"].parameters()]
    before = [p.detach().clone() for p in mine]
    updates = by_hand(model, 0.1)
    assert model.plugins["smooth"].optimise(step, step.objectives)
    for p, old, g in zip(mine, before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * g, rtol=1e-4, atol=1e-6)
    assert [u[:2] for u in updates] == [("step", None)]


def test_without_length_it_is_the_plain_step(make_step, by_hand):
    results = []
    for rho in (0.0, None):
        model, step = make_step({"align": DANN(**SMALL), "smooth": SDAT(rho=rho or 0.0)}, bottleneck=5)
        objectives.collect(model, step)
        by_hand(model, 0.1)
        if rho is None:
            model.manual_update(sum(step.objectives.values()))
        else:
            model.plugins["smooth"].optimise(step, step.objectives)
        results.append([p.detach().clone() for p in encoder_and_head(model)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_ascent_has_its_length_and_raises_the_loss(make_step):
    model, step = make_step({}, bottleneck=5)
    parameters = encoder_and_head(model)

    def loss():
        return F.cross_entropy(model.head(model.bottleneck(step.source.x)), step.source.y)

    before = loss()
    offsets = ascent(torch.autograd.grad(before, parameters), 0.1)
    assert sum(float(o.square().sum()) for o in offsets) ** 0.5 == pytest.approx(0.1, rel=1e-5)
    kept = [p.detach().clone() for p in parameters]
    with moved(model, parameters, offsets):
        after = loss()
        assert model.head.linear.weight is not parameters[-2]
    assert 0 < float((after - before).detach()) < 0.2
    assert all(torch.equal(a, b) for a, b in zip(parameters, kept, strict=True))
    assert model.head.linear.weight is parameters[-2]
    with pytest.raises(ValueError, match="inside"), moved(model, parameters, offsets):
        raise ValueError("inside")
    assert model.head.linear.weight is parameters[-2]
    assert ascent([torch.zeros(3)], 0.1)[0].tolist() == [0, 0, 0]


def test_the_task_is_what_does_not_align(make_step):
    plugins = {"align": DANN(**SMALL), "penalty": BSP(), "refine": Certainty(), "smooth": SDAT()}
    model, step = make_step(plugins, bottleneck=5)
    objectives.collect(model, step)
    found = step.objectives

    def of(task):
        return float(SDAT(task=task).task_loss(step).detach())

    everything = float((found["classification"] + found["refine/entropy"]).detach())
    assert of(None) == pytest.approx(everything)
    assert of(["classification", "refine"]) == pytest.approx(everything)
    assert of(["refine/entropy"]) == pytest.approx(float(found["refine/entropy"].detach()))
    assert of(["align"]) == pytest.approx(float(found["align/domain"].detach()))


def test_an_unknown_task_is_refused(make_step):
    with pytest.raises(uda.UDAError, match=r"no objective 'refine/x'.*classification"):
        make_step({"align": DANN(**SMALL), "smooth": SDAT(task=["refine/x"])})
    model, step = make_step({"align": DANN(**SMALL), "smooth": SDAT(task=["align/x"])})
    objectives.collect(model, step)
    with pytest.raises(uda.UDAError, match="none of this step's objectives"):
        model.plugins["smooth"].optimise(step, step.objectives)
    with pytest.raises(uda.UDAError, match="rho must not be negative"):
        SDAT(rho=-1.0)


CASE = {"init_args": {"rho": 0.2}, "partners": {"align": {"class_path": "CDAN", "init_args": {"hidden": 8}}}}


@pytest.mark.slow
def test_plugin():
    report = check_plugin(SDAT, **CASE, ddp=False)
    assert not report.warnings
