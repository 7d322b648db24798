"""Source-free methods: what trains, the two steps of a hand-over, and the lifecycle."""

from __future__ import annotations

import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from uda_sourcefree import GLC, LEAD, LFTL, NOTELA, NRC, SHOT, AaD, CoLearn, SHOTPlusPlus

import uda
from uda.cli import main
from uda.testing import check_plugin, check_plugins_ddp

CASES = [
    (SHOT, {"label_weight": 0.5}), (NRC, {"neighbours": 2, "expanded": 2}), (AaD, {"neighbours": 2, "beta": 1.0}),
    (NOTELA, {"neighbours": 3, "trainable": "all"}), (NOTELA, {"neighbours": 3, "mode": "offline", "trainable": "all"}),
    (CoLearn, {}), (SHOTPlusPlus, {"rotation": 0.0}),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "frozen"), [("online", False), ("offline", True)])
def test_notela_trains_what_it_says(handed_over, mode, frozen):
    place, _ = handed_over
    name = f"notela_{mode}"
    options = {"mode": mode, "neighbours": 5, "freeze_statistics": frozen}
    plugin = {"class_path": "NOTELA", "init_args": options}
    assert adapted(place, name, plugin, "--trainer.max_epochs=1") == 0
    start = torch.load(place / "source.ckpt", weights_only=True)["state_dict"]
    end = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    moved = {k for k, v in start.items() if not torch.equal(v, end[k])}
    norm = {f"bottleneck.net.1.{n}" for n in ("weight", "bias")}
    statistics = {f"bottleneck.net.1.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == (norm if frozen else norm | statistics)


def test_notela_needs_something_to_train(handed_over):
    place, _ = handed_over
    model = uda.UDA("identity", {"refine": NOTELA()}, bottleneck=0, scores=[])
    data = uda.DataModule(uda.data.Arrays(str(place / "target.npz"), kind="features"), None, "b", batch_size=16)
    with pytest.raises(uda.UDAError, match="no BatchNorm to train"):
        L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(model, data)


# ------------------------------------------------------------------------------------------------ the two steps


CONFIG = {
    "model": {
        "backbone": "identity", "bottleneck": 32, "head": "weight_norm",
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.02, "momentum": 0.9}},
    },
    "data": {
        "reader": {"class_path": "Arrays", "init_args": {"path": "", "kind": "features"}}, "source": "a", "target": "b",
        "batch_size": 32, "epoch_steps": 20,
    },
    "trainer": {
        "max_epochs": 4, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def handed_over(tmp_path_factory):
    """The checkpoint of a source model, and a place where only the target's file is."""
    place = tmp_path_factory.mktemp("life")
    draw = np.random.default_rng(0)
    centres, y = 2.2 * draw.normal(size=(4, 6)), np.arange(320) % 4
    x = centres[y] + draw.normal(size=(320, 6))
    turn = np.eye(6) + 0.25 * draw.normal(size=(6, 6))
    np.savez(place / "both.npz", a_x=x, a_y=y, b_x=x @ turn + 0.6, b_y=y)
    np.savez(place / "target.npz", b_x=x @ turn + 0.6, b_y=y)
    owner = {**CONFIG, "data": {**CONFIG["data"], "reader": {"class_path": "Arrays", "init_args": {
        "path": str(place / "both.npz"), "kind": "features"}}}}  # fmt: skip
    (place / "owner.yaml").write_text(yaml.safe_dump(owner))
    assert main(["fit", "--config", str(place / "owner.yaml"), f"--run_dir={place / 'source'}"]) == 0
    shutil.copy(place / "source" / "checkpoints" / "last.ckpt", place / "source.ckpt")
    before = json.loads((place / "source" / "summary.json").read_text())["target_accuracy"]["last"]
    shutil.rmtree(place / "source")
    (place / "both.npz").unlink()  # the owner keeps the data
    return place, before


def adapted(place, name, plugin, *words):
    config = {**CONFIG, "data": {**CONFIG["data"], "source": None, "reader": {"class_path": "Arrays", "init_args": {
        "path": str(place / "target.npz"), "kind": "features"}}}}  # fmt: skip
    config["model"] = {**CONFIG["model"], "plugins": {"refine": plugin}}
    (place / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return main([
        "fit", "--config", str(place / f"{name}.yaml"), f"--model.init_from={place / 'source.ckpt'}",
        f"--run_dir={place / name}", *words,
    ])  # fmt: skip


ALL = {"SHOTPlusPlus": {"init_args": {"rotation": 0}}, "NOTELA": {"init_args": {"trainable": "all"}}}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("NRC", "AaD", "NOTELA", "CoLearn", "SHOTPlusPlus")]


@pytest.mark.parametrize("name", ["SHOT", *SLOW])
def test_the_target_improves_without_the_source(handed_over, name):
    place, before = handed_over
    assert adapted(place, name, {"class_path": name, **ALL.get(name, {})}) == 0
    summary = json.loads((place / name / "summary.json").read_text())
    assert summary["source"] == []
    assert summary["target_accuracy"]["last"] > before + 0.02
    start = torch.load(place / "source.ckpt", weights_only=True)["state_dict"]
    end = torch.load(place / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    kept = {k: torch.equal(v, end[k]) for k, v in start.items() if k.startswith("head.")}
    assert all(kept.values()) == (name in ("SHOT", "CoLearn", "SHOTPlusPlus"))  # which freeze the classifier
    assert not torch.equal(start["bottleneck.net.0.weight"], end["bottleneck.net.0.weight"])


class Labels(uda.Plugin):
    """Soft labels with weights, for some of the batch."""

    @uda.hookimpl
    def pseudo_label(self, step):
        b = len(step.target)
        soft = torch.tensor([[0.7, 0.2, 0.1]]).roll(1, 1).expand(b, 3)
        return uda.PseudoLabels(soft.argmax(1), torch.linspace(0.1, 1, b), soft, torch.arange(b) % 2 == 0)


@pytest.mark.parametrize(
    ("plugin", "name", "scale"),
    [
        (SHOT(label_weight=0.5, entropy_weight=0.0), "labels", 0.5), (GLC(label_weight=0.5), "labels", 0.5),
        (NOTELA(3, dropout=0.0, trainable="all"), "student", 1.0),
    ],
)  # fmt: skip
def test_labels_of_another_plugin_count_as_they_say(plugin, name, scale):
    """Distributions, weights and masks; by the equation."""
    torch.manual_seed(0)
    model = uda.UDA("identity", {"pseudo": Labels(), "refine": plugin}, bottleneck=0, num_classes=3, input_shape=[4],
                    sizes={"target": 9})  # fmt: skip
    step = uda.Step(model, {"target": {"x": torch.randn(6, 4), "index": torch.arange(6)}}, 0.5, 0, 0)
    uda.objectives.collect(model, step)
    found = step.objectives
    log_p, pseudo = step.target.logits.detach().log_softmax(1), step.target.pseudo
    value = sum(-float(pseudo.weight[i] * (pseudo.soft[i] * log_p[i]).sum()) for i in (0, 2, 4)) / 6
    assert float(found[f"refine/{name}"].detach()) == pytest.approx(scale * value, rel=1e-5)


def test_notela_leaves_alone_what_other_plugins_bring():
    class Head(uda.Plugin):
        @uda.hookimpl
        def build(self, model):
            self.net = torch.nn.Linear(2, 2)

    model = uda.UDA("identity", {"other": Head(), "refine": NOTELA(3)}, bottleneck=4, num_classes=3, input_shape=[4])
    assert all(p.requires_grad for p in model.plugins["other"].parameters())
    assert not model.head.linear.weight.requires_grad


def test_a_checkpoint_of_other_classes_is_refused(handed_over, capsys):
    place, _ = handed_over
    words = ["--data.classes={known: ['0', '1', '2']}"]
    assert adapted(place, "other", {"class_path": "SHOT"}, *words) == 2
    assert "classes" in capsys.readouterr().err


def start(place, init, reader="bare.npz"):
    """SHOT from a file of weights, on a target without labels."""
    x = np.load(place / "target.npz")["b_x"]
    np.savez(place / "bare.npz", b_x=x)
    model = uda.UDA("identity", {"refine": SHOT()}, bottleneck=32, head="weight_norm", scores=[],
                    init_from=init and str(place / init))  # fmt: skip
    data = uda.DataModule(uda.data.Arrays(str(place / reader), kind="features"), None, "b", batch_size=16)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_train_batches": 1}
    L.Trainer(max_epochs=1, accelerator="cpu", devices=1, limit_val_batches=0, **quiet).fit(model, data)
    return model


def test_a_target_without_labels_has_the_classes_of_the_model(handed_over, recwarn):
    place, _ = handed_over
    assert start(place, "source.ckpt").class_names == ["0", "1", "2", "3"]
    assert not [w for w in recwarn if "never trained" in str(w.message)]
    with pytest.raises(uda.UDAError, match=r"no class is known.*data.classes"):
        start(place, None)
    with pytest.warns(UserWarning, match="'refine' makes the run source-free.*never trained.*model.init_from"):
        start(place, None, "target.npz")


@pytest.mark.slow
def test_an_adapted_model_predicts_when_the_file_of_the_source_has_gone(handed_over, capsys):
    place, _ = handed_over
    np.savez(place / "bare.npz", b_x=np.load(place / "target.npz")["b_x"])
    shutil.copy(place / "source.ckpt", place / "lent.ckpt")
    words = [f"--data.reader.init_args.path={place / 'bare.npz'}", f"--model.init_from={place / 'lent.ckpt'}"]
    assert adapted(place, "lent", {"class_path": "SHOT"}, *words, "--trainer.max_epochs=1") == 0
    (place / "lent.ckpt").unlink()
    assert main(["predict", f"--ckpt_path={place / 'lent' / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert len((place / "lent" / "predictions.csv").read_text().splitlines()) == 321


@pytest.mark.parametrize(
    ("file", "message"),
    [([1], "holds no weights"), ({"state_dict": {}}, "holds no weights"), (None, "NaN or infinite weights.*head.bias")],
)
def test_a_file_without_weights_is_refused(handed_over, file, message):
    place, _ = handed_over
    if file is None:
        file = torch.load(place / "source.ckpt", weights_only=True)
        file["state_dict"]["head.bias"][0] = torch.nan
    torch.save(file, place / "bad.ckpt")
    with pytest.raises(uda.UDAError, match=message):
        start(place, "bad.ckpt", "target.npz")


def test_an_aligner_beside_it_is_refused(handed_over):
    place, _ = handed_over

    class Aligner(uda.Plugin):
        @uda.hookimpl
        def align_features(self, step):
            return {"gap": step.pooled("features").mean()}

    model = uda.UDA("identity", {"refine": SHOT(), "align": Aligner()}, bottleneck=8, scores=[])
    data = uda.DataModule(uda.data.Arrays(str(place / "target.npz"), kind="features"), None, "b", batch_size=16)
    with pytest.raises(uda.UDAError, match=r"'align' \(Aligner\) aligns .* 'refine' \(SHOT\) makes"):
        L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).fit(model, data)


def test_bad_arguments():
    for make in (
        lambda: SHOT(label_weight=-1.0), lambda: SHOT(rounds=0), lambda: NRC(neighbours=0), lambda: NRC(low=2.0),
        lambda: AaD(beta=-1.0),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()


# ------------------------------------------------------------------------------------------------ lifecycle


def test_plugin():
    check_plugin(SHOT, ddp=False)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), CASES[1:])
def test_other_plugins(cls, options):
    check_plugin(cls, init_args=options, ddp=False)


@pytest.mark.slow
def test_under_two_processes(tmp_path):
    (tmp_path / "labels.csv").write_text("id,label\n" + "".join(f"target/{i},{'abc'[i % 3]}\n" for i in range(48)))
    oracle = {"class_path": "SimulatedOracle", "init_args": {"labels": str(tmp_path / "labels.csv")}}
    more = [(GLC, {"neighbours": 3}), (LEAD, {"neighbours": 3}), (LFTL, {"budget": 6, "rounds": 2, "oracle": oracle})]
    check_plugins_ddp([(cls, {"init_args": options}) for cls, options in [*CASES, *more]])
