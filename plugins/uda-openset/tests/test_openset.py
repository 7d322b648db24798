"""Open-set methods against their equations in loops, and on targets with classes of their own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from uda_openset import OSBP
from uda_openset.osbp import boundary_loss
from uda_openset.unknown import unknown_logit

import uda
from uda.testing import check_plugin, check_plugins_ddp

CASES = [(OSBP, {}, {})]


def softmax(z):
    e = np.exp(np.asarray(z) - np.max(z))
    return e / e.sum()


# ------------------------------------------------------------------------------------------------ equations


def test_one_more_logit_is_a_softmax_over_one_more_class():
    draw = np.random.default_rng(0)
    z, u, y = 3 * draw.normal(size=(5, 4)), 3 * draw.normal(size=5), draw.integers(0, 4, 5)
    d = unknown_logit(torch.tensor(z), torch.tensor(u)[:, None])
    for i in range(5):
        p = softmax([*z[i], u[i]])
        assert float(d[i].sigmoid()) == pytest.approx(p[4], rel=1e-9)
        own = -math.log(softmax(z[i])[y[i]]) + float(torch.nn.functional.softplus(d[i]))
        assert own == pytest.approx(-math.log(p[y[i]]), rel=1e-9)
        assert float(torch.nn.functional.softplus(-d[i])) == pytest.approx(-math.log(p[4]), rel=1e-9)


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_boundary_by_loops(t):
    d = torch.tensor([0.3, -2.0, 4.0], dtype=torch.double)
    p = [1 / (1 + math.exp(-v)) for v in d.tolist()]
    expected = np.mean([-t * math.log(q) - (1 - t) * math.log(1 - q) for q in p])
    assert float(boundary_loss(d, t)) == pytest.approx(expected, rel=1e-9)


def test_the_classifier_goes_to_the_boundary_and_features_leave_it():
    plugin, head = OSBP(gamma=0.0), torch.nn.Linear(3, 2)
    torch.manual_seed(0)
    plugin.build(SimpleNamespace(feature_dim=3))
    f = torch.randn(6, 3, requires_grad=True)
    source = SimpleNamespace(logits=head(f.detach()), features=f.detach(), weight=None)
    step = SimpleNamespace(
        target=SimpleNamespace(features=f), sources={"s": source}, progress=0.5,
        model=SimpleNamespace(head=head), domain_mean=lambda d: next(iter(d.values())),
    )  # fmt: skip
    loss = plugin.align_features(step)["boundary"]
    grad_f, grad_u = torch.autograd.grad(loss, [f, plugin.unknown.weight])

    def value(features, shift):
        with torch.no_grad():
            d = unknown_logit(head(features), plugin.unknown(features) + (features @ shift.T))
            return float(boundary_loss(d))

    still, start = torch.zeros(1, 3), float(loss.detach())
    assert value(f.detach() - 0.1 * grad_f, still) > start  # features that descend raise the loss
    assert value(f.detach(), -0.1 * grad_u) < start  # the classifier lowers it


def test_source_weights_count():
    plugin = OSBP()
    plugin.build(SimpleNamespace(feature_dim=3))
    f, z = torch.randn(4, 3), torch.randn(4, 2)
    one = SimpleNamespace(features=f, logits=z, weight=torch.tensor([1.0, 0, 0, 0]))
    step = SimpleNamespace(sources={"s": one}, domain_mean=lambda d: next(iter(d.values())))
    d = unknown_logit(z, plugin.unknown(f))[0]
    torch.testing.assert_close(plugin.source_known(step), torch.nn.functional.softplus(d) / 4)


# ------------------------------------------------------------------------------------------------ what they do


def fitted(plugins, epochs=4, **options):
    """Known classes 0 to 2, target-private 3 to 5; figures on the target."""
    torch.manual_seed(0)
    data = uda.DataModule(
        uda.data.Generated("blobs", classes=6, n=360, features=8, noise=0.3, seed=4), "source", "target", seed=0,
        setting="open", classes={"known": 3, "target_private": 3}, batch_size=32, epoch_steps=20, **options,
    )  # fmt: skip
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    model = uda.UDA("mlp", plugins, bottleneck=16)
    trainer.fit(model, data)
    return model, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_osbp_finds_unknown_classes():
    model, figures = fitted({"align": OSBP()})
    assert figures["oracle/h_score"] > 0.5
    batch = model.eval().batch(torch.randn(20, 8))
    marked = model.predict_batch(batch)
    assert marked.label.max() < 3
    z = torch.cat([batch.logits, model.plugins["align"].unknown(batch.features)], 1)
    torch.testing.assert_close(marked.unknown, z.argmax(1) == 3)


def test_bad_arguments():
    for make in (lambda: OSBP(weight=-1.0), lambda: OSBP(threshold=1.0), lambda: OSBP(gamma=-1.0)):
        with pytest.raises(uda.UDAError):
            make()


# ------------------------------------------------------------------------------------------------ lifecycle


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options", "kit"), CASES)
def test_plugin(cls, options, kit):
    check_plugin(cls, init_args=options, ddp=False, **kit)


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp([(cls, {"init_args": options, **kit}) for cls, options, kit in CASES])
