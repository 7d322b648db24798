"""Lazy features: who is forwarded, when, and with which statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import uda
from uda.nn import active_domain, convert_batchnorm


class Count(nn.Module):
    """A backbone that counts its forwards and the rows it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.rows: list[int] = []

    def forward(self, x):
        self.rows.append(len(x))
        return self.linear(x)


def make(plugins=None, **options):
    torch.manual_seed(0)
    model = uda.UDA(
        Count(), plugins=plugins, bottleneck=5, num_classes=3, input_shape=[4], source_names=["a", "b"], **options
    )
    model.backbone.rows.clear()
    return model


def data(sources=("a",), views=(), held_out=False):
    g = torch.Generator().manual_seed(0)
    out = {
        "sources": {
            n: {"x": torch.randn(8, 4, generator=g), "y": torch.randint(0, 3, (8,), generator=g)} for n in sources
        },
        "target": {"x": torch.randn(6, 4, generator=g), **{v: torch.randn(6, 4, generator=g) for v in views}},
    }
    if held_out:
        out["held_out"] = {"x": torch.randn(5, 4, generator=g)}
    return out


def test_joint_forward_runs_once_for_all_domains():
    model = make()
    step = uda.Step(model, data(("a", "b"), held_out=True), 0.0, 0, 0)
    assert step.source is step.sources["a"]
    assert step.target.features.shape == (6, 5)
    assert step.sources["b"].logits.shape == (8, 3)
    assert model.backbone.rows == [22]
    assert step.held_out.features.shape == (5, 5)
    assert model.backbone.rows == [22, 5]  # no objective trains on it: it stays out of the common statistics
    assert len(step.gate) == 1


def test_separate_forward_uses_own_statistics():
    batch = data()
    joint, separate = make(), make(forward_mode="separate")
    one, two = uda.Step(joint, batch, 0.0, 0, 0), uda.Step(separate, batch, 0.0, 0, 0)
    _ = two.source.features, two.target.features
    assert separate.backbone.rows == [8, 6]
    z = separate.bottleneck.net[0](separate.backbone.linear(batch["target"]["x"]))
    own = torch.relu((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt())
    torch.testing.assert_close(two.target.features, own)
    assert not torch.allclose(one.target.features, own, atol=1e-3)


def test_views_are_forwarded_when_asked_for():
    model = make()
    step = uda.Step(model, data(views=("weak", "strong")), 0.0, 0, 0)
    _ = step.source.logits
    assert model.backbone.rows == [14]
    assert step.target.view("strong").logits.shape == (6, 3)
    assert model.backbone.rows == [14, 6]
    with pytest.raises(KeyError, match="source_views"):
        step.source.view("weak")


def test_a_forward_without_gradient_serves_no_objective():
    model = make()
    step = uda.Step(model, data(views=("weak",)), 0.0, 0, 0)
    view = step.target.view("weak")
    with torch.no_grad():
        labels = view.logits.argmax(1)
        assert view.logits is view.logits
    assert model.backbone.rows == [6]
    assert not step.gate
    assert view.logits.requires_grad  # another plugin trains on the view
    assert model.backbone.rows == [6, 6]
    assert len(step.gate) == 1
    assert torch.equal(view.logits.argmax(1), labels)
    with torch.no_grad():
        assert view.logits.requires_grad  # what is there serves
    assert model.backbone.rows == [6, 6]
    view.features = view.features.detach()  # put there on purpose: it stays
    assert not view.features.requires_grad
    assert model.backbone.rows == [6, 6]


def test_logits_without_gradient_of_features_with():
    model = make()
    step = uda.Step(model, data(), 0.0, 0, 0)
    _ = step.target.features
    with torch.no_grad():
        assert not step.target.logits.requires_grad
    assert step.target.logits.requires_grad
    assert model.backbone.rows == [14]


def test_a_target_batch_carries_no_label():
    batch = data()
    batch["target"]["y"] = torch.zeros(6, dtype=torch.long)
    assert uda.Step(make(), batch, 0.0, 0, 0).target.y is None


def test_replaced_inputs_are_forwarded_anew():
    model = make()
    step = uda.Step(model, data(), 0.0, 0, 0)
    old = step.target.features
    step.target.x = step.target.x + 1
    assert not torch.equal(step.target.features, old)


def test_different_shapes_name_the_domains():
    batch = data()
    batch["target"]["x"] = torch.randn(6, 7)
    with pytest.raises(uda.UDAError, match=r"a \(4,\), target \(7,\).*separate"):
        _ = uda.Step(make(), batch, 0.0, 0, 0).target.features


def test_source_only_never_forwards_the_target(small_data, quiet_trainer):
    model = uda.UDA(nn.Sequential(nn.Linear(2, 8), nn.ReLU()), bottleneck=4)
    seen = []
    dm = small_data()
    trainer = quiet_trainer(max_epochs=1)
    model.training_step_ = model.training_step

    class Look(uda.Plugin):
        pass

    def spy(batch, batch_idx):
        seen.append(set(batch))
        return model.training_step_(batch, batch_idx)

    model.training_step = spy
    trainer.fit(model, dm)
    assert seen
    assert all(keys == {"sources"} for keys in seen)


class Domains(nn.Module):
    """A layer that notes the domain that it is called for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list = []

    def forward(self, x):
        self.seen.append(active_domain())
        return x


def test_layers_learn_the_domains_of_their_rows():
    """A joint forward names its parts in the order of the rows; the head is called for one domain at a time."""
    model = make()
    backbone, head = Domains(), Domains()
    model.backbone, model.head = nn.Sequential(model.backbone, backbone), nn.Sequential(model.head, head)
    step = uda.Step(model, data(("a", "b"), held_out=True), 0.0, 0, 0)
    for batch in (step.target, step.sources["b"], step.held_out):
        assert batch.logits.shape[1] == 3
    joint, alone = backbone.seen
    assert joint.role == "joint"
    assert joint.parts == (("a", "source", 8), ("b", "source", 8), ("target", "target", 6))
    assert (alone.name, alone.role) == ("target", "held_out")
    assert [(d.name, d.role) for d in head.seen] == [("target", "target"), ("b", "source"), ("target", "held_out")]
    assert active_domain() is None


def test_a_layer_by_domain_refuses_a_joint_forward():
    """It would take source rows for target rows."""
    model = make()
    model.backbone = convert_batchnorm(nn.Sequential(model.backbone, nn.BatchNorm1d(6)))
    with pytest.raises(uda.UDAError, match="forward_mode"):
        _ = uda.Step(model, data(), 0.0, 0, 0).source.features
    separate = make(forward_mode="separate")
    separate.backbone = model.backbone
    assert uda.Step(separate, data(), 0.0, 0, 0).source.features.shape == (8, 5)
