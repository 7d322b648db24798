"""A step's batch once more, for methods of several passes."""

from __future__ import annotations

import torch

import uda
from uda import objectives, ranks
from uda.nn import MLP


class Mixes(uda.Plugin):
    """Changes the inputs, leaves a note for a later hook, and hangs an intermediate on the batch."""

    manual = True

    @uda.hookimpl
    def prepare_batch(self, step):
        step.source.x = step.source.x + 1
        step.source.cache["mixes/note"] = "kept"

    @uda.hookimpl
    def transform_features(self, batch, features):
        assert "mixes/seen" not in batch.cache
        batch.cache["mixes/seen"] = features
        return 2 * features

    @uda.hookimpl
    def align_features(self, step):
        assert step.source.cache["mixes/note"] == "kept"
        self.log_later(gap=1.0)
        return {"gap": (step.source.features.mean(0) - step.target.features.mean(0)).square().sum()}

    @uda.hookimpl
    def weigh_objectives(self, objectives):
        return {"classification": 3.0}


def make_step(plugin=None):
    torch.manual_seed(0)
    backbone = MLP([6], batch_norm=False)
    model = uda.UDA(
        backbone, {"mixes": plugin or Mixes()}, bottleneck=5, bottleneck_norm="none", num_classes=3, input_shape=[4],
        source_names=["a"],
    )  # fmt: skip
    data = {
        "sources": {"a": {"x": torch.randn(8, 4), "y": torch.arange(8) % 3, "index": torch.arange(8)}},
        "target": {"x": torch.randn(6, 4), "weak": torch.randn(6, 4)},
        "held_out": {"x": torch.randn(5, 4)},
    }
    step = uda.Step(model, data, 0.3, 4, 9)
    objectives.prepare(model, step)
    objectives.collect(model, step)
    return model, step


def test_a_second_pass_sees_the_prepared_batch_and_nothing_of_the_first():
    model, step = make_step()
    again = model.again(step)
    assert (again.progress, again.batch_idx, again.index) == (0.3, 4, 9)
    assert torch.equal(again.source.x, step.source.x)
    assert torch.equal(again.source.y, step.source.y)
    assert torch.equal(again.target.view("weak").x, step.target.view("weak").x)
    assert len(again.held_out) == 5
    assert again.objectives.keys() == step.objectives.keys() == {"classification", "mixes/gap"}
    for name, value in step.objectives.items():
        torch.testing.assert_close(again.objectives[name], value)
    assert model.plugins["mixes"].take_diagnostics() == {}
    third = model.again(again, collect=False)
    assert not third.objectives
    assert third.source.cache == {"mixes/note": "kept"}
    assert third.target.y is None


class Gives(uda.Plugin):
    """Puts constant features in the place of the source's."""

    manual = True

    @uda.hookimpl
    def prepare_batch(self, step):
        step.source.features = torch.ones(8, 5)
        step.source.views["x"].set_logits(torch.zeros(8, 3))


def test_features_that_were_given_are_given_again():
    model, step = make_step(Gives())
    assert step.objectives.keys() == {"classification"}
    again = model.again(step)
    assert torch.equal(again.source.features, torch.ones(8, 5))
    assert torch.equal(again.source.logits, torch.zeros(8, 3))
    assert again.target.features.requires_grad


def test_a_second_pass_is_made_at_the_weights_of_now():
    model, step = make_step()
    with torch.no_grad():
        model.head.linear.weight.mul_(0)
        model.head.linear.bias.mul_(0)
    again = model.again(step)
    torch.testing.assert_close(again.objectives["classification"], torch.tensor(3.0).log())


def test_the_total_is_weighed(monkeypatch):
    """Backbone and bottleneck get the weighted, the head the plain gradient of the second pass."""
    monkeypatch.setattr(objectives.running, "log_weights", lambda *_: None)  # it asks a trainer
    model, step = make_step()
    again = model.again(step)
    w, head = model.bottleneck.net[0].weight, model.head.linear.weight
    got = torch.autograd.grad(model.total(again), [w, head], retain_graph=True)
    one, two = again.objectives["classification"], again.objectives["mixes/gap"]
    expected = torch.autograd.grad(3 * one + two, [w], retain_graph=True) + torch.autograd.grad(one, [head])
    torch.testing.assert_close(got, expected)


def test_mean_over_one_process_is_the_tensor_itself():
    tensors = [torch.randn(2, 3), torch.randn(4, dtype=torch.float64)]
    assert all(a is b for a, b in zip(ranks.mean_over_ranks(tensors), tensors, strict=True))


class Weighs(uda.Plugin):
    """Leaves out the first source sample and doubles the second."""

    manual = True

    @uda.hookimpl
    def prepare_batch(self, step):
        step.source.weight = torch.tensor([0.0, 2.0, 1, 1, 1, 1, 1, 1])


def test_weights_of_source_samples():
    model, step = make_step(Weighs())
    each = torch.nn.functional.cross_entropy(step.source.logits, step.source.y, reduction="none")
    expected = (each[1:].sum() + each[1]) / 8
    torch.testing.assert_close(step.objectives["classification"], expected)
    torch.testing.assert_close(model.again(step).objectives["classification"], expected)
