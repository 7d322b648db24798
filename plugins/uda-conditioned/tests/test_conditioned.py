"""DCAN and GDCAN against their equations, written a second time in numpy and plain loops."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from uda_conditioned import DCAN, GDCAN
from uda_conditioned.attention import ChannelAttention, ConditionedLayer
from uda_conditioned.points import condition, find_points

import uda
from uda.kernels import multi_kernel_mmd
from uda.nn import SmallCNN, domain_context, make_backbone
from uda.testing import check_plugin, check_plugins_ddp

C, F = 3, 5


class Rows(nn.Module):
    """Features that are the input, through a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, x):
        return self.linear(x).relu()


def make(cls=DCAN, backbone=None, shape=(4,), **options):
    torch.manual_seed(0)
    arguments = {k: options.pop(k) for k in ("forward_mode", "bottleneck_norm") if k in options}
    given = {"bottleneck": F, "bottleneck_norm": "none", "num_classes": C, "input_shape": list(shape), **arguments}
    return uda.UDA(backbone or Rows(), plugins={"network": cls(**options)}, source_names=["a"], **given)


def batch_of(model, shape=(4,), seed=1, ns=7, nt=5):
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(ns) % C
    data = {
        "sources": {"a": {"x": torch.randn(ns, *shape, generator=g), "y": y}},
        "target": {"x": torch.randn(nt, *shape, generator=g) + 0.5},
    }
    return uda.Step(model, data, 0.5, 0, 0)


# ------------------------------------------------------------------------------------------------ places

NETS = [
    ("small_cnn", (1, 8, 8), ["net.2", "net.6"]),
    ("mlp", (5,), ["net.3"]),
    ("identity", (5,), [""]),
    ("timm:legacy_seresnet18", (3, 32, 32), None),
    ("torchvision:resnet18", (3, 32, 32), [f"model.layer{i}.{j}.bn2" for i in range(1, 5) for j in range(2)]),
    ("torchvision:mobilenet_v2", (3, 32, 32), None),
]


@pytest.mark.parametrize(("name", "shape", "places"), NETS, ids=[n for n, *_ in NETS])
def test_places(name, shape, places):
    """Attention starts neutral, once, and then tells the domains apart."""
    pytest.importorskip(name.split(":")[0] if ":" in name else "torch")
    torch.manual_seed(0)
    net = make_backbone(name)
    x = torch.randn(2, *shape)
    with torch.no_grad():
        net.eval()(x)
        before = net(x)
        keys = set(net.state_dict())
        found = condition(net, shape, "auto", 16, gated=False)
        torch.testing.assert_close(net(x), before, rtol=1e-5, atol=0)
        assert condition(net, shape, "auto", 16, gated=False) == []
        assert places is None or found == places
        conditioned = [m for m in net.modules() if isinstance(m, ConditionedLayer)]
        assert len(conditioned) == len(found) > 0
        if "se" not in name:  # names of the layers that were there stay, so that their weights still load
            assert keys < set(net.state_dict())
        for m in net.modules():
            if isinstance(m, ChannelAttention):
                nn.init.normal_(m.expand.weight)
        for m in conditioned:
            m.source.weight.add_(torch.randn_like(m.source.weight))
        with domain_context("a", "source"):
            assert not torch.allclose(net(x), before, rtol=1e-3, atol=0)
        clone = pickle.loads(pickle.dumps(net))
        torch.testing.assert_close(clone(x), net(x))


def test_places_by_name():
    net = SmallCNN(1, (4, 8))
    assert find_points(net, (1, 8, 8), ["net.1"]) == ["net.1"]
    assert find_points(net, (1, 8, 8), []) == []
    with pytest.raises(uda.UDAError, match=r"no layer 'net.22'.*net.2"):
        find_points(net, (1, 8, 8), ["net.22"])
    with pytest.raises(uda.UDAError, match="no place 'blocks'"):
        find_points(net, (1, 8, 8), "blocks")
    reused = nn.ReLU()
    net = nn.Sequential(nn.Conv2d(1, 4, 1), reused, nn.Conv2d(4, 6, 1), reused, nn.Flatten())
    with pytest.raises(uda.UDAError, match="run once"):
        find_points(net, (1, 4, 4), ["1"])
    assert find_points(net, (1, 4, 4), "stages") == ["2"]


def test_two_conditioned_networks_are_refused():
    with pytest.raises(uda.UDAError, match="keep one"):
        uda.UDA(Rows(), plugins={"a": DCAN(), "b": GDCAN()}, num_classes=C, input_shape=[4])


# ------------------------------------------------------------------------------------------------ the method


def block(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """Linear-ReLU-Linear from the weights."""
    first, second = net[0], net[2]
    hidden = (x @ first.weight.T + first.bias).clamp(min=0)
    return hidden @ second.weight.T + second.bias


def test_only_the_target_is_adapted(stir):
    """``f^ = f + D1(f)``, ``o^ = W f^ + D2(W f^)``, in a step as in inference; sources go without."""
    model = stir(make(where=[]))
    step = batch_of(model)
    linear = model.head.linear
    raw = {b.role: model.bottleneck(model.backbone(b.x)) for b in (step.source, step.target)}
    torch.testing.assert_close(step.source.features, raw["source"])
    torch.testing.assert_close(step.source.logits, raw["source"] @ linear.weight.T + linear.bias)
    adapted = raw["target"] + block(model.plugins["network"].feature_block, raw["target"])
    o = adapted @ linear.weight.T + linear.bias
    torch.testing.assert_close(step.target.features, adapted)
    torch.testing.assert_close(step.target.logits, o + block(model.head.adaptation, o))
    torch.testing.assert_close(model(step.target.x), step.target.logits)
    torch.testing.assert_close(model.batch(step.source.x, "source").logits, step.source.logits)


@pytest.mark.parametrize("mode", ["joint", "separate"])
@pytest.mark.parametrize(("cls", "kind"), [(DCAN, "rows"), (GDCAN, "images")])
def test_domains_reach_the_attention(mode, cls, kind, stir):
    shape = (4,) if kind == "rows" else (1, 8, 8)
    backbone = Rows() if kind == "rows" else nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.ReLU(), nn.Flatten())
    model = stir(make(cls, backbone, shape, forward_mode=mode))
    step = batch_of(model, shape)
    for batch in (step.source, step.target):
        with domain_context(batch.name, batch.role):
            expected = model.bottleneck(model.backbone(batch.x))
        if batch.role == "target":
            expected = expected + block(model.plugins["network"].feature_block, expected)
        torch.testing.assert_close(batch.features, expected)
    with domain_context("a", "source"):
        assert not torch.allclose(model.bottleneck(model.backbone(step.target.x)), step.target.features)


def test_objectives(monkeypatch, stir):
    model = stir(make(weight=0.7, entropy_weight=0.3, random_prob=1.5))
    plugin, step = model.plugins["network"], batch_of(model)
    chosen = {}
    draw = torch.rand

    def noted(*args, **kwargs):
        chosen["u"] = draw(*args, **kwargs)
        return chosen["u"]

    monkeypatch.setattr(torch, "rand", noted)
    got = {name: loss.detach() for name, loss in plugin.align_features(step).items()}
    fs, ft, os, ot = (x.detach() for x in (step.source.features, step.target.features, step.source.logits,
                                           step.target.logits))  # fmt: skip
    five = multi_kernel_mmd(fs, ft)  # tested against loops with the other kernels
    one = multi_kernel_mmd(os.softmax(1), ot.softmax(1), kernels=1, bandwidth=1.68)
    assert float(got["features"]) == pytest.approx(0.7 * float(five), rel=1e-5)
    assert float(got["logits"]) == pytest.approx(0.7 * float(one), rel=1e-5)

    adapted = (fs + block(plugin.feature_block, fs)).detach()
    o = adapted @ model.head.linear.weight.T + model.head.linear.bias
    adapted_logits = (o + block(model.head.adaptation, o)).detach()
    pooled = torch.cat([fs, adapted]).double()
    distance = torch.cdist(pooled, pooled).square()
    width = float(distance.sum() / (len(pooled) * (len(pooled) - 1)))  # one bandwidth serves all classes
    total = 0.0
    for k in range(C):
        members = [i for i in range(len(fs)) if int(step.source.y[i]) == k]
        subset = [i for i in range(len(fs)) if float(chosen["u"][k, i]) < 1.5 / C]
        if members and subset:
            total += float(multi_kernel_mmd(fs[members], adapted[subset], bandwidth=width))
            total += float(multi_kernel_mmd(os[members], adapted_logits[subset], kernels=1, bandwidth=1.68))
    assert float(got["regulariser"]) == pytest.approx(0.7 * total / C, rel=1e-4)

    probs = ot.double().softmax(1).numpy()
    entropy = np.mean([-sum(p * math.log(p) for p in row) for row in probs])
    assert float(plugin.refine_classifier(step)["entropy"].detach()) == pytest.approx(0.3 * entropy, rel=1e-5)


def test_options_of_the_objectives():
    step = batch_of(make(regulariser="none"))
    assert set(step.model.plugins["network"].align_features(step)) == {"features", "logits"}
    model = make(regulariser="class", where=[])
    for p in [*model.plugins["network"].feature_block.parameters(), *model.head.adaptation.parameters()]:
        nn.init.zeros_(p)
    got = model.plugins["network"].align_features(batch_of(model))
    assert float(got["regulariser"].detach()) == pytest.approx(0.0, abs=1e-5)  # each class is itself
    with pytest.raises(uda.UDAError, match=r"unknown regulariser 'clas'.*'class'"):
        DCAN(regulariser="clas")
    with pytest.raises(uda.UDAError, match=r"unknown where 'stage'.*'stages'"):
        DCAN(where="stage")
    with pytest.raises(uda.UDAError, match="must not be negative"):
        DCAN(weight=-1.0)
    with pytest.raises(uda.UDAError, match="threshold"):
        GDCAN(threshold=1.1)


def test_descent_brings_the_adapted_target_to_the_source():
    """Only the feature block and the target's branch move: sources stay where they are."""
    model = make(weight=1.0, entropy_weight=0.0, regulariser="none")
    plugin = model.plugins["network"]
    own = [*plugin.feature_block.parameters(), *model.get_submodule("backbone.conditioned.reduce.target").parameters()]
    optimizer = torch.optim.Adam(own, lr=0.01)
    first = None
    for _ in range(60):
        step = batch_of(model, ns=30, nt=30)
        loss = plugin.align_features(step)["features"]
        source = step.source.features.detach()
        first = (float(loss.detach()), source) if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.5 * first[0]
    torch.testing.assert_close(source, first[1])


def test_rates_and_frozen_norms():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    model = make(DCAN, net, (1, 8, 8), freeze_norm=True, adapt_lr_scale=0.5, attention_lr_scale=2.0)
    groups = {g["name"]: g for g in model.parameter_groups()}
    assert groups["network_blocks"]["lr_scale"] == 0.5
    assert len(groups["network_blocks"]["params"]) == 8
    assert groups["network_attention"]["lr_scale"] == 2.0
    assert len(groups["network_attention"]["params"]) == 6
    assert len(groups["backbone"]["params"]) == 4  # and none of them is claimed twice
    model.train()
    model.plugins["network"].prepare_batch(batch_of(model, (1, 8, 8)))
    norm = model.backbone[1]
    assert not norm.training
    assert not norm.weight.requires_grad


def test_decision_is_in_the_checkpoint(tmp_path):
    """A loaded model takes the branch that training decided for."""
    import lightning as L

    from uda.data import DataModule
    from uda.testing import TinyTask

    data = DataModule(TinyTask("images"), source=["source"], target="target", batch_size=16, epoch_steps=3)
    model = uda.UDA(SmallCNN(1, (4, 8)), plugins={"network": GDCAN(threshold=1.0)}, bottleneck=8)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(model, data)
    layers = [m for m in model.backbone.modules() if isinstance(m, ConditionedLayer)]
    assert len(layers) == 2
    assert all(bool(m.shared) and int(m.steps) == 3 for m in layers)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = uda.UDA.load_from_checkpoint(tmp_path / "a.ckpt", map_location="cpu").eval()
    x = torch.rand(4, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model.eval()(x))
    assert all(bool(m.shared) for m in loaded.backbone.modules() if isinstance(m, ConditionedLayer))


def test_plugin_dcan_on_rows():
    report = check_plugin(DCAN, init_args={"adapt_lr_scale": 1.0, "regulariser": "class"}, ddp=False)
    assert set(report.objectives) == {"features", "logits", "regulariser", "entropy"}


@pytest.mark.slow
def test_plugin_gdcan_on_images():
    check_plugin(GDCAN, kind="images", model_args={"forward_mode": "separate"}, ddp=False)


@pytest.mark.slow
def test_two_sources():
    check_plugin(GDCAN, sources=2, only=["lifecycle", "liveness"])


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp(
        [
            (DCAN, {}),
            (GDCAN, {"kind": "images", "model_args": {"forward_mode": "separate"}}),
            (GDCAN, {"init_args": {"threshold": 1.0}, "sources": 2}),
        ]
    )
