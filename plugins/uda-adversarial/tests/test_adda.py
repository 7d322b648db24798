"""ADDA: both sides of its game one sample at a time, and its two stages in one run."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn
from uda_adversarial import ADDA

import uda
from uda.data import DataModule
from uda.nn import MLP
from uda.testing import TinyTask, check_plugin

SMALL = {"hidden": 5, "layers": 1}


def logits_of(plugin, x: torch.Tensor) -> list[float]:
    """The discriminator in plain loops."""
    one, two = (m for m in plugin.discriminator.net if isinstance(m, nn.Linear))
    out = []
    for row in x.tolist():
        hidden = [
            max(0.0, sum(a * b for a, b in zip(row, w, strict=True)) + c)
            for w, c in zip(one.weight.tolist(), one.bias.tolist(), strict=True)
        ]
        out.append(sum(a * b for a, b in zip(hidden, two.weight.tolist()[0], strict=True)) + float(two.bias.detach()))
    return out


def bce(logits, label) -> float:
    p = [1 / (1 + math.exp(-z)) for z in logits]
    return -sum(math.log(q if label else 1 - q) for q in p) / len(p)


def second_stage(make_step, **options):
    plugin = ADDA(**SMALL, **options)
    _, step = make_step({"align": plugin}, progress=0.5)
    source = step.source.x
    target = step.target.x.clone().requires_grad_()
    plugin.prepare_batch(step)
    step.target.features = target
    return plugin, step, source, target


def test_objectives_of_the_second_stage(make_step):
    plugin, step, source, target = second_stage(make_step, weight=0.4)
    assert torch.equal(step.source.features, source)
    assert not step.source.logits.requires_grad  # the classification trains nothing
    found = plugin.align_features(step)
    zs, zt = logits_of(plugin, source), logits_of(plugin, target.detach())
    assert float(found["discriminator"].detach()) == pytest.approx(0.5 * (bce(zs, 1) + bce(zt, 0)), rel=1e-5)
    assert float(found["target"].detach()) == pytest.approx(0.4 * bce(zt, 1), rel=1e-5)


def test_each_side_has_its_own_objective(make_step):
    plugin, step, _, target = second_stage(make_step)
    found, own = plugin.align_features(step), list(plugin.discriminator.parameters())
    assert torch.autograd.grad(found["discriminator"], [target], allow_unused=True, retain_graph=True) == (None,)
    assert all(g is None for g in torch.autograd.grad(found["target"], own, allow_unused=True, retain_graph=True))
    (grad,) = torch.autograd.grad(found["target"], [target])
    with torch.no_grad():  # inverted labels: the target moves to where it is taken for source
        before, after = (plugin.discriminator(x).mean() for x in (target, target - grad))
    assert after > before


def test_the_reversed_form_is_minus_the_discriminators(make_step):
    plugin, step, _, target = second_stage(make_step, inverted=False, reversal=2.0)
    (got,) = torch.autograd.grad(plugin.align_features(step)["target"], [target])
    leaf = target.detach().clone().requires_grad_()
    loss = torch.log1p(plugin.discriminator(leaf).exp()).mean() / 2
    torch.testing.assert_close(got, -2.0 * torch.autograd.grad(loss, [leaf])[0])


class Snapshots(L.Callback):
    """State before each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, module, *_):
        self.states.append({k: v.detach().clone() for k, v in module.state_dict().items()})


def fit(plugins):
    torch.manual_seed(0)
    model = uda.UDA(MLP([16]), plugins, bottleneck=8)
    model.base_seed = 1
    snapshots = Snapshots()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, callbacks=[snapshots],
    )  # fmt: skip
    data = DataModule(TinyTask(), source="source", target="target", batch_size=8, epoch_steps=4, seed=5)
    trainer.fit(model, data)
    return snapshots.states


def test_two_stages_in_one_run():
    """8 batches, the first 4 on the source."""
    states = fit({"align": ADDA(**SMALL, pretrain=0.5)})

    def same(i, j, prefix, other=None):
        keys = [k for k in states[i] if k.startswith(prefix) and "num_batches" not in k]
        assert keys
        return all(torch.equal(states[i][k], states[j][(other or prefix) + k.removeprefix(prefix)]) for k in keys)

    frozen = "plugins.align.source_encoder.copies."
    assert same(0, 3, "plugins.align.discriminator.")
    assert not same(3, 7, "plugins.align.discriminator.")
    assert not same(0, 3, "head.")
    assert same(3, 7, "head.")
    assert same(3, 7, "backbone.", frozen + "0.")
    assert same(3, 7, "bottleneck.", frozen + "1.")
    assert not same(3, 7, "backbone.")
    assert same(4, 7, frozen)
    assert [bool(s["plugins.align.adapting"]) for s in states] == 4 * [False] + 4 * [True]


def test_bad_arguments_are_refused():
    with pytest.raises(uda.UDAError, match="share of the run"):
        ADDA(pretrain=1.0)


CASE = {"init_args": {"hidden": 8, "pretrain": 0.45}}


@pytest.mark.slow
def test_plugin():
    """The run is resumed from before and from after the change of stage, among others."""
    report = check_plugin(ADDA, **CASE, ddp=False)
    assert report.objectives == ["discriminator", "target"]
    assert not report.warnings
