"""Partial methods against their equations in loops, and on a target that lacks classes."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from uda_partial import BA3US, PADA, SAN, ClassWeights
from uda_partial.ba3us import augmented_domain_loss, complement_entropy
from uda_partial.san import ClasswiseDiscriminators, selective_loss
from uda_partial.weights import class_weights

import uda
from uda.testing import check_plugin, check_plugins_ddp

SMALL = {"hidden": 8}
CASES = [
    (PADA, {**SMALL, "temperature": 0.1}), (SAN, {**SMALL, "warmup": 0.0, "every": 2}),
    (BA3US, {**SMALL, "complement_weight": 2.0}), (ClassWeights, {"normalise": "mean"}),
]  # fmt: skip


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def softplus(v):
    return math.log1p(math.exp(v))


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("normalise", ["max", "sum", "mean"])
def test_class_weights_by_loops(normalise):
    z = 2 * np.random.default_rng(0).normal(size=(7, 4))
    gamma = sum(softmax(row / 0.5) for row in z) / 7
    gamma = gamma / {"max": gamma.max(), "sum": gamma.sum(), "mean": gamma.mean()}[normalise]
    np.testing.assert_allclose(class_weights(torch.tensor(z), 0.5, normalise), gamma, rtol=1e-12)


@pytest.mark.parametrize("rows", [0, 2])
def test_augmented_domain_loss_by_loops(rows):
    draw = np.random.default_rng(1)
    zs, zt, ws, wt = draw.normal(size=6), draw.normal(size=5), draw.random(6), draw.random(5)
    source = sum(w * softplus(-z) for w, z in zip(ws, zs, strict=True))
    source += sum(ws[i] * softplus(zs[i]) for i in range(rows))
    source /= sum(ws) + sum(ws[:rows])
    target = sum(w * softplus(z) for w, z in zip(wt, zt, strict=True)) / sum(wt)
    expected = ((1 + rows / 6) * source + target) / (2 + rows / 6)
    got = augmented_domain_loss(*map(torch.tensor, (zs, zt, ws, wt)), rows)
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_complement_entropy_by_loops_and_whom_its_gradient_spreads():
    draw = np.random.default_rng(2)
    z, y, w = draw.normal(size=(5, 4)), draw.integers(0, 4, 5), draw.random(5)
    total, norm = 0.0, 0.0
    for zi, c, wi in zip(z, y, w, strict=True):
        p = softmax(zi)
        q = np.delete(p, c) / (1 - p[c])
        total += wi * (1 - p[c]) * (q * np.log(q)).sum() / math.log(3)
        norm += wi * (1 - p[c])
    logits = torch.tensor(z, requires_grad=True)
    value = complement_entropy(logits, torch.tensor(y), torch.tensor(w))
    assert float(value.detach()) == pytest.approx(total / norm, rel=1e-9)
    value.backward()
    right = logits.grad.gather(1, torch.tensor(y)[:, None])
    torch.testing.assert_close(right, torch.zeros_like(right))  # the true class is left alone
    sharp = torch.tensor([[0.0, 5.0, -5.0]], requires_grad=True)
    complement_entropy(sharp, torch.tensor([0]), torch.ones(1)).backward()
    assert sharp.grad[0, 1] > 0 > sharp.grad[0, 2]  # descent draws the wrong classes together


def test_discriminators_and_selective_loss_by_loops():
    torch.manual_seed(0)
    net = ClasswiseDiscriminators(3, 4, 5, 1, 0.0).double()
    x, p, w = torch.randn(6, 4).double(), torch.rand(6, 3).double().softmax(1), torch.rand(3).double()
    logits = torch.zeros(6, 3).double()
    for k in range(3):
        (w0, w1), (b0, b1) = [v[k] for v in net.weights], [v[k] for v in net.biases]
        for i in range(6):
            logits[i, k] = ((x[i] @ w0 + b0[0]).relu() @ w1 + b1[0])[0]
    torch.testing.assert_close(net(x), logits)
    z = logits.detach()
    for domain in (0.0, 1.0):
        total = sum(
            float(w[k] * p[i, k]) * softplus(float(-z[i, k] if domain else z[i, k]))
            for i in range(6) for k in range(3)
        )  # fmt: skip
        assert float(selective_loss(logits, domain, p, w).detach()) == pytest.approx(total / 6, rel=1e-6)


@pytest.mark.parametrize("progress", [0.0, 0.3])
def test_objective_of_san_by_loops(progress):
    """Both halves, each discriminator's reversal, and an entropy that grows with it."""
    torch.manual_seed(1)
    plugin = SAN(weight=0.2, entropy_weight=0.4, gamma=5.0, **SMALL)
    plugin.build(SimpleNamespace(num_classes=3, feature_dim=4))
    plugin.eval()
    plugin.class_weight.copy_(torch.tensor([1.5, 1.2, 0.3]))
    fs, ft = torch.randn(5, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    zs, zt = torch.randn(5, 3), torch.randn(6, 3)
    step = SimpleNamespace(
        progress=progress, pooled={"features": fs, "logits": zs}.get, target=SimpleNamespace(features=ft, logits=zt)
    )
    plugin.log_later = lambda **_: None
    found = plugin.align_features(step)["domains"]
    grown = 2 / (1 + math.exp(-5 * progress)) - 1
    total, entropy = 0.0, 0.0
    for sign, f, z in ((-1, fs, zs), (1, ft, zt)):
        d = plugin.discriminators(f).detach().numpy()
        for i, row in enumerate(z.numpy()):
            p = softmax(row)
            total += sum(float(plugin.class_weight[k]) * p[k] * softplus(sign * d[i, k]) for k in range(3)) / len(z) / 2
            entropy -= sum(v * math.log(v) for v in p) / 6 if sign == 1 else 0
    assert float(found.detach()) == pytest.approx(0.2 * total, rel=1e-5)
    assert float(plugin.refine_classifier(step)["entropy"]) == pytest.approx(0.4 * grown * entropy, rel=1e-5, abs=1e-9)
    (reversed_,) = torch.autograd.grad(found, ft, retain_graph=True)
    ways = selective_loss(plugin.discriminators(ft), 0.0, zt.softmax(1), plugin.class_weight)
    (straight,) = torch.autograd.grad(ways, ft)
    torch.testing.assert_close(reversed_, -grown * 0.1 * straight)


@pytest.mark.parametrize("mean", ["batch", "both", "weighted"])
def test_domain_objective_of_pada_by_loops(mean):
    plugin = refreshed(PADA(weight=0.5, domain_mean=mean, **SMALL), torch.tensor([[1.0, 0.0, -2.0]]))
    gamma = softmax(np.array([1.0, 0.0, -2.0])) / softmax(np.array([1.0, 0.0, -2.0])).max()
    zs, zt, y = [0.3, -1.0, 2.0, 0.5], [0.7, -0.4, 1.5], [0, 2, 1, 2]
    plugin.domain_logits = lambda step, source, target: (torch.tensor(zs), torch.tensor(zt))
    step = SimpleNamespace(
        pooled={"y": torch.tensor(y), "features": torch.zeros(4, 2)}.get,
        target=SimpleNamespace(features=torch.zeros(3, 2)),
    )
    source = sum(gamma[c] * softplus(-z) for c, z in zip(y, zs, strict=True))
    target, weights = sum(softplus(z) for z in zt) / 3, sum(gamma[c] for c in y)
    halves = {"both": (source / 4, target * weights / 4), "weighted": (source / weights, target)}
    halves["batch"] = (source / 4, target)
    assert float(plugin.align_features(step)["domain"]) == pytest.approx(0.5 * sum(halves[mean]) / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------ what they do


def refreshed(plugin, logits, progress=0.5, classes=3):
    plugin.make_estimate(classes)
    plugin.refresh(SimpleNamespace(progress=progress), SimpleNamespace(target=SimpleNamespace(logits=logits)))
    return plugin


def test_classes_that_the_target_lacks_weigh_little_after_the_warmup():
    logits = torch.tensor([[4.0, 0.0, -4.0], [0.0, 4.0, -4.0]]).repeat(10, 1)
    early = refreshed(ClassWeights(warmup=0.6), logits)
    assert early.class_weight.tolist() == [1, 1, 1]
    late = refreshed(ClassWeights(warmup=0.4), logits)
    assert late.class_weight[2] < 0.01
    batch = SimpleNamespace(y=torch.tensor([0, 1, 2, 2]), weight=None)
    late.log_later = lambda **_: None
    late.prepare_batch(SimpleNamespace(sources={"s": batch}))
    assert float(batch.weight.mean()) == pytest.approx(1)
    assert batch.weight[2:].max() < 0.01 * batch.weight[0]
    by_batch = refreshed(ClassWeights(mean="batch"), logits)
    by_batch.log_later = lambda **_: None
    by_batch.prepare_batch(SimpleNamespace(sources={"s": batch}))  # weights of two plugins multiply
    assert float(batch.weight[0]) == pytest.approx(4 / (2 + 2 * float(late.class_weight[2])), rel=1e-3)


@pytest.fixture
def quiet_trainer():
    """``quiet_trainer(max_epochs=1)``: on one CPU, and says nothing."""
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return lambda **options: L.Trainer(accelerator="cpu", devices=1, **dict.fromkeys(off, False), **options)


def partial(**options):
    """Six classes in the source, the first three in the target."""
    split = {"known": 3, "source_private": 3}
    return uda.DataModule(
        uda.data.Generated("blobs", classes=6, n=360, features=6, noise=0.3, seed=2), "source", "target",
        setting="partial", classes=split, batch_size=32, epoch_steps=20, seed=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("cls", "options"), CASES[:3])
def test_the_weights_find_the_classes(cls, options, quiet_trainer):
    torch.manual_seed(0)
    data = partial()
    plugin = cls(**{**options, "warmup": 0.25})
    model = uda.UDA("mlp", {"align": plugin}, bottleneck=16)
    trainer = quiet_trainer(max_epochs=6)
    trainer.fit(model, data)
    weight = model.plugins["align"].class_weight
    assert float(weight[:3].mean()) > 1.5 * float(weight[3:].mean())
    named = {n: float(v) for n, v in trainer.callback_metrics.items()}
    assert named["oracle/target_accuracy"] > 0.6


def test_weights_differ_from_no_weights(quiet_trainer):
    """The same seed, with and without: other networks."""
    ends = []
    for plugins in ({}, {"w": ClassWeights(warmup=0.0)}, {"a": PADA(weight=0.0, warmup=0.0, **SMALL)}):
        torch.manual_seed(0)
        model = uda.UDA("mlp", plugins, bottleneck=16)
        quiet_trainer(max_epochs=3).fit(model, partial())
        ends.append(next(model.head.parameters()).detach().clone())
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-3, atol=1e-4)  # PADA without its adversary is the weights


def test_bad_arguments():
    for make in (
        lambda: ClassWeights(temperature=0.0), lambda: ClassWeights(normalise="l2"), lambda: ClassWeights(mean="all"),
        lambda: PADA(warmup=1.5), lambda: PADA(domain_mean="sum"), lambda: SAN(entropy_weight=-1.0),
        lambda: SAN(dropout=1.0), lambda: BA3US(lent=2.0),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()


def test_an_open_target_is_refused(quiet_trainer):
    data = uda.DataModule(
        uda.data.Generated("blobs", classes=6, n=120, features=4), "source", "target", batch_size=16, epoch_steps=1,
        classes={"known": 3, "source_private": 1, "target_private": 2},
    )  # fmt: skip
    with pytest.raises(uda.UDAError, match="PADA"):
        quiet_trainer(max_epochs=1).fit(uda.UDA("mlp", {"align": PADA(**SMALL)}, bottleneck=8), data)


def test_the_side_task_goes_with_the_weights_in_a_partial_setting():
    """What the page recommends is not refused: rotation or jigsaw with entropy, beside the weights."""
    from uda import checks
    from uda.discovery import registry

    overlays = Path(__file__).resolve().parents[3] / "configs" / "methods"
    for name in ("rotation", "jigsaw"):
        plugins = {}
        for overlay in (name, "class_weights"):
            for key, p in yaml.safe_load((overlays / f"{overlay}.yaml").read_text())["model"]["plugins"].items():
                plugins[key] = registry().get(p["class_path"])(**p.get("init_args", {}))
        model = uda.UDA("small_cnn", plugins, bottleneck=8)
        checks.check_setting(model, SimpleNamespace(setting="partial"))
        spread = uda.UDA("small_cnn", {"refine": type(plugins["refine"])(diversity=True)}, bottleneck=8)
        with pytest.raises(uda.UDAError, match="partial"):
            checks.check_setting(spread, SimpleNamespace(setting="partial"))


def test_the_self_supervised_variant_serves_the_setting():
    from uda import checks

    overlays = Path(__file__).resolve().parents[3] / "configs" / "methods"
    plugins = yaml.safe_load((overlays / "pada_rotation.yaml").read_text())["model"]["plugins"]
    model = uda.UDA("small_cnn", plugins, bottleneck=8, num_classes=3, input_shape=[1, 8, 8], sizes={"target": 4})
    checks.check_setting(model, SimpleNamespace(setting="partial"))
    assert [type(p).__name__ for p in model.plugins.values()] == ["PADA", "Rotation", "EntropyMinimisation"]


# ------------------------------------------------------------------------------------------------ lifecycle


def test_plugin():
    report = check_plugin(PADA, init_args=SMALL, ddp=False)
    assert report.objectives == ["domain"]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), CASES[1:])
def test_other_plugins(cls, options):
    check_plugin(cls, init_args=options, ddp=False)


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp([(cls, {"init_args": options}) for cls, options in CASES])
