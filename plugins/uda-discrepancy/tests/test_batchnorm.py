"""AdaBN and DSBN: which statistics and which parameters each domain gets."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from uda_discrepancy import DSBN, AdaBN, adabn
from uda_discrepancy.adabn import Moments, fit_statistics
from uda_discrepancy.domain_norm import domain_norms

import uda
from uda.data import DataModule
from uda.nn import MLP, domain_context
from uda.testing import TinyTask, check_plugin

SEPARATE = {"forward_mode": "separate"}


def fitted(*plugins, seed=0, epochs=1, sources=("source",), **model_args):
    torch.manual_seed(seed)
    names = ("network", "align")
    model = uda.UDA(
        model_args.pop("backbone", None) or MLP([8], batch_norm=True),
        dict(zip(names, plugins, strict=False)),
        bottleneck=6,
        **{**SEPARATE, **model_args},
    )
    data = DataModule(
        TinyTask(sources=len(sources)), list(sources), "target", batch_size=8, epoch_steps=4, eval_batch_size=20, seed=1
    )
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    return model, data, trainer


def test_moments_against_numpy():
    """Batches of unequal size, means far from zero."""
    x = 100 + torch.randn(50, 3, 4, 5)
    moments = Moments(3, x.device)
    for part in x.split([7, 1, 30, 12]):
        moments.add(part)
    rows = x.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 3)
    np.testing.assert_allclose(moments.mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.squares / (moments.count - 1), rows.var(0, ddof=1), rtol=1e-3)
    assert int(moments.everywhere().count) == len(rows)


def test_fit_statistics_of_stacked_layers():
    """The second layer sees inputs that each batch's own statistics have normalised; nothing else changes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2), nn.BatchNorm1d(2))
    batches = [3 + 2 * torch.randn(n, 3) for n in (10, 14, 1)]
    net.train()
    net[1].eval()
    fit_statistics(net, [net[0], net[3]], batches, net)
    assert [m.training for m in net] == [True, False, True, True]
    x = [b.double().numpy() for b in batches[:2]]  # one sample has no statistics
    w, b = (p.detach().double().numpy() for p in (net[2].weight, net[2].bias))
    deep = np.concatenate([((v - v.mean(0)) / np.sqrt(v.var(0) + net[0].eps)) @ w.T + b for v in x])
    for norm, seen in ((net[0], np.concatenate(x)), (net[3], deep)):
        np.testing.assert_allclose(norm.running_mean, seen.mean(0), atol=1e-5)
        np.testing.assert_allclose(norm.running_var, seen.var(0, ddof=1), rtol=1e-4)
        assert int(norm.num_batches_tracked) == 0


def target_pool(data: DataModule) -> torch.Tensor:
    return torch.cat([batch["x"] for batch in data.pool_dataloader("target")])


def test_adabn_pass_gives_the_targets_statistics():
    """First layer: exactly those of the target pool. Source branch, weights: as in training without the plugin."""
    model, data, _ = fitted(AdaBN())
    assert bool(model.plugins["network"].fresh)
    layer = next(m for m in model.backbone.modules() if isinstance(m, nn.Linear))
    norm = domain_norms(model)[0]
    seen = layer(target_pool(data)).detach()
    torch.testing.assert_close(norm.norms["target"].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.norms["target"].running_var, seen.var(0), rtol=1e-4, atol=1e-5)
    plain, _, _ = fitted()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name, rtol=0, atol=0)
    bn = next(m for m in plain.backbone.modules() if isinstance(m, nn.BatchNorm1d))
    torch.testing.assert_close(norm.norms["source"].running_mean, bn.running_mean)


def test_a_source_only_checkpoint_is_a_start(tmp_path):
    """All branches take the weights and statistics of the plain net; a test alone then adapts."""
    plain, data, trainer = fitted()
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    start = {"init_from": str(tmp_path / "source.ckpt"), **SEPARATE}
    model = uda.UDA(MLP([8], batch_norm=True), {"network": AdaBN()}, bottleneck=6, **start)
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).test(
        model, data, verbose=False
    )
    (norm, *_), bn = domain_norms(model), next(m for m in plain.backbone.modules() if isinstance(m, nn.BatchNorm1d))
    assert torch.equal(norm.norms["source"].running_mean, bn.running_mean)
    assert torch.equal(norm.norms["target"].weight, bn.weight)
    seen = next(m for m in model.backbone.modules() if isinstance(m, nn.Linear))(target_pool(data)).detach()
    torch.testing.assert_close(norm.norms["target"].running_mean, seen.mean(0), rtol=1e-4, atol=1e-5)


def test_adabn_statistics_wait_for_new_weights():
    """One pass an epoch, not one a batch; a test after training needs none."""
    plugin = AdaBN()
    calls = []
    collect = plugin.collect
    plugin.collect = lambda model: (calls.append(1), collect(model))
    model, data, trainer = fitted(plugin, epochs=2)
    assert len(calls) == 2
    norm = domain_norms(model)[0].norms["target"]
    before = norm.running_mean.clone()
    trainer.test(model, data, verbose=False)
    trainer.predict(model, data)
    assert len(calls) == 2
    assert torch.equal(norm.running_mean, before)


class TargetMean(uda.Plugin):
    """An objective on the target's features."""

    @uda.hookimpl
    def align_features(self, step):
        """Squared mean."""
        return {"mean": step.target.features.mean(0).square().sum()}


class Predicts(TargetMean):
    """Ends the round of ``predict``."""

    @uda.hookimpl
    def predict(self, batch):
        """The classifier's own."""
        score, label = batch.logits.softmax(1).max(1)
        return uda.Prediction(label, score)


def test_adabn_behind_a_plugin_that_predicts():
    """Statistics do not depend on the order of the plugins."""
    model, data, _ = fitted(AdaBN(), Predicts())
    turned = uda.UDA(
        MLP([8], batch_norm=True), {"align": Predicts(), "network": AdaBN()}, bottleneck=6, **SEPARATE, **data.spec
    )
    turned.load_state_dict({**model.state_dict(), "plugins.network.fresh": torch.tensor(False)})
    norm = domain_norms(turned)[0].norms["target"]
    norm.running_mean.zero_()
    L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False).test(
        turned, data, verbose=False
    )
    torch.testing.assert_close(norm.running_mean, domain_norms(model)[0].norms["target"].running_mean)


def test_adabn_batches_mix_what_is_sorted(monkeypatch):
    """A pool in the order of its classes would normalise each class by itself."""
    seen = []
    plain = adabn.fit_statistics

    def spy(model, norms, batches, forward):
        batches = list(batches)
        seen.append(torch.cat(batches))
        plain(model, norms, batches, forward)

    monkeypatch.setattr(adabn, "fit_statistics", spy)
    _, data, _ = fitted(AdaBN())
    pool = target_pool(data)
    assert not torch.equal(seen[0], pool)
    assert sorted(seen[0].tolist()) == sorted(pool.tolist())


def test_running_adabn_follows_the_target_batches():
    model, _, _ = fitted(AdaBN("running"))
    norm = domain_norms(model)[0]
    assert int(norm.norms["target"].num_batches_tracked) == int(norm.norms["source"].num_batches_tracked) == 4
    assert norm.norms["target"].weight is norm.norms["source"].weight
    assert not torch.equal(norm.norms["target"].running_mean, norm.norms["source"].running_mean)


@pytest.mark.parametrize("per_source", [True, False])
def test_branches_of_several_sources(per_source):
    model, _, _ = fitted(AdaBN("running", per_source=per_source), sources=("source", "source2"))
    norm = domain_norms(model)[0]
    assert sorted(norm.norms) == (["source", "source2", "target"] if per_source else ["source", "target"])
    assert int(norm.norms["source"].num_batches_tracked) == (4 if per_source else 8)


def test_dsbn_branches_learn_apart_and_inference_takes_the_targets():
    model, _, _ = fitted(DSBN(), TargetMean())
    norm = domain_norms(model)[0]
    assert not torch.equal(norm.norms["source"].weight, norm.norms["target"].weight)
    model.eval()
    x = torch.rand(5, 6)
    inference = model(x)
    with domain_context("target", "target"):
        torch.testing.assert_close(inference, model.head(model.bottleneck(model.backbone(x))))
    with domain_context("source", "source"):
        assert not torch.allclose(inference, model.head(model.bottleneck(model.backbone(x))))


@pytest.mark.parametrize("plugin", [AdaBN(), DSBN()])
def test_what_cannot_work_is_refused(plugin):
    sizes = {"num_classes": 3, "input_shape": [6]}
    plugins = {"network": plugin, "align": TargetMean()}
    with pytest.raises(uda.UDAError, match=r"forward_mode: separate"):
        uda.UDA("mlp", plugins, **sizes)
    with pytest.raises(uda.UDAError, match="no BatchNorm"):
        uda.UDA("identity", plugins, bottleneck_norm="layer", **SEPARATE, **sizes)


def test_dsbn_alone_is_refused():
    with pytest.raises(uda.UDAError, match=r"alone leaves the target's scale and shift untrained"):
        uda.UDA("identity", {"network": DSBN()}, num_classes=3, input_shape=[6], **SEPARATE)


NORMED = {**SEPARATE, "bottleneck_norm": "batch"}


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["pass", "running"])
def test_adabn_plugin(statistics):
    check_plugin(AdaBN, init_args={"statistics": statistics}, model_args=NORMED, ddp=False)


@pytest.mark.slow
def test_dsbn_plugin():
    check_plugin(DSBN, partners={"align": {"class_path": "DAN"}}, model_args=NORMED, ddp=False)
