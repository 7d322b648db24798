"""The skeleton: construction, checkpoints, optimiser groups, errors before the first step."""

from __future__ import annotations

import functools
from typing import ClassVar

import lightning as L
import pytest
import torch
from torch import nn

import uda
from uda.nn import MLP


class Shift(uda.Plugin):
    """Mean difference of features, with one parameter of its own."""

    def __init__(self, weight: float = 1.0, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.gain = nn.Parameter(torch.tensor(scale))

    @uda.hookimpl
    def align_features(self, step):
        return {"mean": self.weight * self.gain * (step.source.features.mean(0) - step.target.features.mean(0)).norm()}


class Broken(Shift):
    def __init__(self, how: str = "raise") -> None:
        super().__init__()
        self.how = how

    @uda.hookimpl
    def align_features(self, step):
        good = self.gain * step.source.features.mean()
        if self.how == "raise":
            raise RuntimeError("no luck")
        return {"nan": {"mean": good * float("nan")}, "vector": {"mean": step.source.features.mean(0)}, "list": [good]}[
            "mean" if self.how == "none" else self.how
        ] if self.how != "nan_later" else {"mean": good * (float("nan") if step.index >= 5 else 1.0)}  # fmt: skip


def fit(small_data, quiet_trainer, plugins, trainer=None, data=None, **options):
    L.seed_everything(0, verbose=False)
    model = uda.UDA(MLP(hidden=(8,), in_features=2), plugins=plugins, bottleneck=4, **options)
    quiet = quiet_trainer(**(trainer or {}))
    quiet.fit(model, small_data(**(data or {})))
    return model, quiet


def test_library_use_without_sizes(small_data, quiet_trainer):
    model, trainer = fit(small_data, quiet_trainer, {"align": Shift()})
    assert model.num_classes == small_data().num_classes
    assert {"source_accuracy", "oracle/target_accuracy", "select/im"} <= trainer.callback_metrics.keys()
    assert model(torch.randn(3, 2)).shape == (3, model.num_classes)


def test_checkpoint_loads_with_weights_only(small_data, quiet_trainer, tmp_path):
    model, trainer = fit(
        small_data, quiet_trainer, {"align": Shift(weight=0.5, scale=2.0)}, label_smoothing=0.1,
        optimizer=functools.partial(torch.optim.SGD, lr=0.05), schedule=uda.optim.Cosine(),
    )  # fmt: skip
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    raw = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert raw["hyper_parameters"]["plugins"]["align"]["init_args"] == {"weight": 0.5, "scale": 2.0}
    again = uda.UDA.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.label_smoothing == 0.1
    assert again.plugins["align"].weight == 0.5
    x = torch.randn(5, 2)
    assert torch.equal(again.eval()(x), model.eval()(x))
    assert again._optimizer([torch.zeros(1, requires_grad=True)]).param_groups[0]["lr"] == 0.05


def test_init_from_takes_weights_only(small_data, quiet_trainer, tmp_path):
    source, trainer = fit(small_data, quiet_trainer, {})
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    L.seed_everything(1, verbose=False)
    model = uda.UDA(
        MLP(hidden=(8,), in_features=2), plugins={"align": Shift(scale=3.0)}, bottleneck=4,
        init_from=str(tmp_path / "source.ckpt"), optimizer=functools.partial(torch.optim.SGD, lr=0.0),
    )  # fmt: skip
    quiet_trainer(max_epochs=1).fit(model, small_data())
    for name, p in source.named_parameters():
        assert torch.equal(p, model.get_parameter(name)), name
    assert model.plugins["align"].gain.item() == 3.0
    model = uda.UDA(MLP(hidden=(9,), in_features=2), bottleneck=4, init_from=str(tmp_path / "source.ckpt"))
    with pytest.raises(uda.UDAError, match="backbone of this run does not fit"):
        quiet_trainer(max_epochs=1).fit(model, small_data())
    model = uda.UDA(MLP(hidden=(8,), in_features=2), bottleneck=4, init_from=str(tmp_path / "absent.ckpt"))
    with pytest.raises(uda.UDAError, match=r"no file .*absent\.ckpt"):
        quiet_trainer(max_epochs=1).fit(model, small_data())


def test_a_loaded_checkpoint_does_not_go_back_to_the_weights_it_began_with(small_data, quiet_trainer, tmp_path):
    _, trainer = fit(small_data, quiet_trainer, {})
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    model, trainer = fit(small_data, quiet_trainer, {}, init_from=str(tmp_path / "source.ckpt"))
    trainer.save_checkpoint(tmp_path / "adapted.ckpt")
    again = uda.UDA.load_from_checkpoint(tmp_path / "adapted.ckpt", weights_only=True)
    quiet_trainer().test(again, small_data(), verbose=False)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    (tmp_path / "source.ckpt").unlink()  # nor are they needed
    quiet_trainer().test(uda.UDA.load_from_checkpoint(tmp_path / "adapted.ckpt", weights_only=True), small_data())


def test_checkpoint_that_lacks_a_plugin_is_named(small_data, quiet_trainer, tmp_path):
    _, trainer = fit(small_data, quiet_trainer, {})
    trainer.save_checkpoint(tmp_path / "source.ckpt")
    model = uda.UDA(MLP(hidden=(8,), in_features=2), plugins={"align": Shift()}, bottleneck=4)
    with pytest.raises(uda.UDAError, match=r"no state for plugin 'align'.*init_from"):
        quiet_trainer(max_epochs=3).fit(model, small_data(), ckpt_path=tmp_path / "source.ckpt")
    _, trainer = fit(small_data, quiet_trainer, {"align": Shift()})
    trainer.save_checkpoint(tmp_path / "aligned.ckpt")
    with pytest.raises(uda.UDAError, match="holds plugin 'align'"):
        quiet_trainer(max_epochs=3).fit(
            uda.UDA(MLP(hidden=(8,), in_features=2), bottleneck=4), small_data(), ckpt_path=tmp_path / "aligned.ckpt"
        )


def test_optimiser_groups_by_name_and_rate():
    class Claims(Shift):
        @uda.hookimpl
        def param_groups(self, model):
            return [{"name": "gain", "params": [self.gain], "lr_scale": 5.0}]

    model = uda.UDA(
        MLP(hidden=(8,), in_features=2), plugins={"a": Claims(), "b": Shift()}, bottleneck=4, num_classes=2,
        input_shape=[2], backbone_lr_scale=0.1, optimizer=functools.partial(torch.optim.SGD, lr=1.0),
    )  # fmt: skip
    optimizer = uda.optim.build_optimizer(model._optimizer, model.parameter_groups())
    rates = {g["name"]: g["lr"] for g in optimizer.param_groups}
    assert rates == pytest.approx({"backbone": 0.1, "bottleneck": 1.0, "head": 1.0, "gain": 5.0, "b": 1.0})
    inside = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert inside == {id(p) for p in model.parameters()}


def test_parameter_claimed_twice():
    class Claims(Shift):
        @uda.hookimpl
        def param_groups(self, model):
            return [{"name": self.key, "params": list(model.head.parameters())}]

    model = uda.UDA(
        MLP(hidden=(8,), in_features=2), plugins={"a": Claims(), "b": Claims()}, bottleneck=4, num_classes=2,
        input_shape=[2],
    )  # fmt: skip
    with pytest.raises(uda.UDAError, match=r"'a'.*'b'|'b'.*'a'"):
        uda.optim.build_optimizer(model._optimizer, model.parameter_groups())


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("raise", uda.PluginError, "Plugin 'align' failed in hook 'align_features': RuntimeError: no luck"),
        ("nan", uda.UDAError, "Objective 'align/mean' of plugin 'align' is nan at step 0"),
        ("nan_later", uda.UDAError, "Objective 'align/mean' of plugin 'align' is nan at step 5"),
        ("vector", uda.UDAError, "must be a scalar tensor, got a tensor of shape"),
        ("list", uda.UDAError, "must return a dict of scalars, got list"),
    ],
)
def test_failures_name_plugin_and_hook(small_data, quiet_trainer, how, error, text):
    with pytest.raises(error, match=text):
        fit(small_data, quiet_trainer, {"align": Broken(how)})


def test_misspelt_hooks_and_arguments():
    class Misspelt(uda.Plugin):
        @uda.hookimpl
        def align_feature(self, step):
            return {}

    class WrongArgument(uda.Plugin):
        @uda.hookimpl
        def align_features(self, stp):
            return {}

    class NotManual(uda.Plugin):
        @uda.hookimpl
        def optimise(self, step):
            return True

    with pytest.raises(uda.UDAError, match=r"'align_feature'.*align_features"):
        uda.UDA("identity", plugins={"a": Misspelt()})
    with pytest.raises(uda.UDAError, match=r"no argument 'stp'.*step"):
        uda.UDA("identity", plugins={"a": WrongArgument()})
    with pytest.raises(uda.UDAError, match="manual = True"):
        uda.UDA("identity", plugins={"a": NotManual()})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"head": "lineer"}, "'linear'"),
        ({"forward_mode": "both"}, "joint"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"plugins": {"a.b": "DANN"}}, "key 'a.b'|Plugin key"),
        ({"plugins": {"items": "DANN"}}, "items"),
        ({"plugins": {"a": "DANNN"}}, "DANN"),
        ({"plugins": {"a": {"class_path": "DANN", "init_args": {"wieght": 1}}}}, "no argument 'wieght'.*'weight'"),
        ({"plugins": {"a": 3}}, "got 3"),
        ({"manual_accumulate": 0}, "manual_accumulate"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(uda.UDAError, match=text):
        uda.UDA("identity", **options)


def test_one_object_under_two_keys():
    plugin = Shift()
    with pytest.raises(uda.UDAError, match="'a' and 'b'"):
        uda.UDA("identity", plugins={"a": plugin, "b": plugin})


def test_nothing_is_chosen_by_target_labels(small_data, quiet_trainer):
    from lightning.pytorch.callbacks import EarlyStopping

    with pytest.raises(uda.UDAError, match=r"EarlyStopping monitors 'oracle/target_accuracy'.*select/im"):
        fit(small_data, quiet_trainer, {}, trainer={"callbacks": [EarlyStopping("oracle/target_accuracy")]})


def test_unbounded_training_is_refused(small_data, quiet_trainer):
    with pytest.raises(uda.UDAError, match=r"max_epochs or trainer\.max_steps"):
        fit(small_data, quiet_trainer, {}, trainer={"max_epochs": -1})


def test_classes_of_model_and_data_must_agree(small_data, quiet_trainer):
    with pytest.raises(uda.UDAError, match="7 classes"):
        fit(small_data, quiet_trainer, {}, num_classes=7, input_shape=[2])


def test_a_run_without_any_objective_is_named(small_data, quiet_trainer):
    class SourceFree(uda.Plugin):
        @uda.hookimpl
        def data_needs(self, model):
            return uda.DataNeeds(source=False)

    with pytest.raises(uda.UDAError, match="No objective"):
        fit(small_data, quiet_trainer, {"a": SourceFree()})


def test_progress_runs_from_zero_to_one_and_survives_a_resume(small_data, quiet_trainer, tmp_path):
    class Note(Shift):
        seen: ClassVar[list[float]] = []

        @uda.hookimpl
        def after_step(self, step):
            self.seen.append(step.progress)

    fit(small_data, quiet_trainer, {"a": Note()}, trainer={"max_epochs": 4})
    assert Note.seen == pytest.approx([i / 16 for i in range(16)])
    Note.seen.clear()
    fit(small_data, quiet_trainer, {"a": Note()}, trainer={"max_epochs": 4, "max_steps": 6})
    assert Note.seen == pytest.approx([i / 6 for i in range(6)])


@pytest.mark.parametrize("accumulate", [1, 3])
def test_after_step_comes_once_a_batch(small_data, quiet_trainer, accumulate):
    class Note(Shift):
        seen: ClassVar[list[bool]] = []

        @uda.hookimpl
        def after_step(self, step):
            assert not torch.is_grad_enabled()
            self.seen.append(step.updated)

    Note.seen.clear()
    fit(small_data, quiet_trainer, {"a": Note()}, trainer={"accumulate_grad_batches": accumulate})
    expected = [True] * 8 if accumulate == 1 else [False, False, True, True] * 2
    assert Note.seen == expected


def test_shuffled_target_labels_change_no_weight(quiet_trainer):
    """The promise: target labels on disk have no path into training."""
    from uda.data import DataModule, Datasets

    g = torch.Generator().manual_seed(0)
    xs, ys = torch.randn(64, 2, generator=g), torch.arange(64) % 2
    xt = torch.randn(64, 2, generator=g) + 0.5
    states = []
    for yt in (torch.arange(64) % 2, torch.arange(64).flip(0) // 32):
        L.seed_everything(0, verbose=False)
        source, target = torch.utils.data.TensorDataset(xs, ys), torch.utils.data.TensorDataset(xt, yt)
        dm = DataModule(Datasets(source=source, target=target), source="source", target="target", batch_size=16)
        plugins = {"a": "CDAN", "b": "MCC"}
        model = uda.UDA(MLP(hidden=(8,), in_features=2), plugins=plugins, bottleneck=4)
        quiet_trainer(max_epochs=3).fit(model, dm)
        states.append(model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.slow
def test_compiled_backbone_keeps_its_keys():
    sizes = {"num_classes": 2, "input_shape": [2]}
    model = uda.UDA(MLP(hidden=(8,), in_features=2), bottleneck=4, compile_backbone=True, **sizes)
    assert not any("_orig_mod" in k for k in model.state_dict())
    assert model.backbone._compiled_call_impl is not None


def test_channels_last_gives_the_same_figures():
    x = torch.randn(2, 1, 8, 8)
    outputs = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        options = {"bottleneck": 4, "num_classes": 2, "input_shape": [1, 8, 8], "channels_last": channels_last}
        outputs.append(uda.UDA("small_cnn", **options).eval()(x))
    torch.testing.assert_close(*outputs)


def test_loading_a_checkpoint_fetches_no_weights(quiet_trainer, tmp_path, monkeypatch):
    """Pretrained weights are fetched once, when training starts; afterwards the checkpoint has them."""
    import timm

    from uda.data import DataModule, Datasets
    from uda.nn import Timm

    asked = []
    create = timm.create_model

    def spy(name, pretrained=False, **options):
        asked.append(pretrained)
        return create(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", spy)
    images = torch.utils.data.TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 2)
    data = DataModule(
        Datasets(source=images, target=images), source="source", target="target", batch_size=4, epoch_steps=1
    )
    model = uda.UDA(Timm("test_resnet.r160_in1k", pretrained=True), bottleneck=4)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = uda.UDA.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert asked == [True, False]
    assert torch.equal(again.eval()(torch.ones(1, 3, 32, 32)), model.eval()(torch.ones(1, 3, 32, 32)))
