"""A look at whole tasks: the right kind of shift, figures in every statement, and no target label read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from uda import UDA, UDAError
from uda.commands.inspect import main
from uda.data import Arrays, DataModule
from uda.data.domains import DomainData, TensorInputs
from uda.data.readers import Reader
from uda.nn import make_backbone
from uda.shift import advice, features
from uda.shift.inspect import inspect_shift
from uda.shift.methods import ORDER, try_first
from uda.shift.priors import class_prior

ROOT = Path(__file__).resolve().parent.parent.parent
FAST = {"permutations": 499, "draws": 60}


class Held(Reader):
    """Arrays by domain name."""

    def __init__(self, **domains):
        self.kept = domains

    def domains(self):
        return list(self.kept)

    def read(self, domain):
        x, y = self.kept[domain]
        y = None if y is None else torch.as_tensor(y)
        return DomainData(domain, TensorInputs(torch.as_tensor(x), "features"), y, [str(i) for i in range(10)])


def task(source, target, **options):
    reader = Held(source=source, target=target)
    return DataModule(reader, source="source", target="target", seed=0, allow_missing_classes=True, **options)


def true_prior(y):
    return class_prior(y, 10)


@pytest.fixture(scope="module")
def halves():
    """Two halves of the handwritten digits."""
    from uda.data.rendered import handwritten_digits

    x, y = handwritten_digits()
    x, y = np.asarray(x, dtype=np.float32).reshape(len(y), -1), np.asarray(y)
    order = np.random.default_rng(0).permutation(len(y))
    return [(x[o], y[o]) for o in np.array_split(order, 2)]


def texts(found, level=None, about=None):
    return " ".join(
        s["text"] for s in found["statements"] if level in (None, s["level"]) and about in (None, s["about"])
    )  # fmt: skip


def checked(found):
    """What holds for each report: plain data, and a figure in every statement."""
    json.dumps(found, allow_nan=False)
    for statement in found["statements"]:
        assert re.search(r"\d", statement["text"]), statement
        assert statement["level"] in ("fact", "advice", "warning")
    return found


# ------------------------------------------------------------------------------------- the three kinds


@pytest.mark.slow
def test_two_halves_of_one_domain_are_no_shift(halves):
    found = checked(inspect_shift(task(*halves), **FAST))
    assert found["verdict"]["setting"] == "none"
    assert found["verdict"]["adapt"] == "no"
    assert found["methods"] == []
    assert "No shift was found" in texts(found, "warning", "do not adapt")
    assert found["shift"]["linear"]["pad_low"] < 0 < found["shift"]["linear"]["pad_high"] + 0.2
    assert found["classifier"]["accuracy"] > 0.9


@pytest.mark.slow
def test_other_class_shares_are_label_shift(halves):
    (xs, ys), (xt, yt) = halves
    keep = np.random.default_rng(1).random(len(yt)) < np.linspace(1.0, 0.1, 10)[yt]
    found = checked(inspect_shift(task((xs, ys), (xt[keep], yt[keep])), **FAST))
    verdict, prior = found["verdict"], found["prior"]
    assert verdict["setting"] == "label"
    assert verdict["adapt"] == "caution"
    for name in ("bbse", "mlls"):
        np.testing.assert_allclose(prior[name]["estimate"], true_prior(yt[keep]), atol=0.05)
    assert prior["mlls"]["total_variation"] > 0.15
    assert "Correct the source classifier's prior" in texts(found, "advice", "first")
    assert "marginal" in texts(found, "warning", "caution")
    assert not {"DANN", "CDAN", "DAN", "CORAL"} & set(found["methods"])


@pytest.mark.slow
def test_rendered_to_handwritten_digits_are_covariate_shift(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert main(["inspect", "--config", str(ROOT / "configs/digits_source_only.yaml"), "--json", str(file)]) == 0
    found = checked(json.loads(file.read_text()))
    assert found["verdict"]["setting"] == "covariate"
    assert found["verdict"]["adapt"] == "yes"
    assert found["shift"]["linear"]["pad_low"] > 1
    assert found["shift"]["mmd"]["p_value"] <= 0.001
    assert found["features"]["origin"] == "inputs"
    assert "starts at random" in texts(found, about="features")
    assert found["seconds"] < 60
    said = capsys.readouterr()
    assert "covariate shift: worth adapting" in said.out
    assert "uda inspect: telling the domains apart" in said.err


@pytest.mark.slow
def test_both_kinds_at_once_are_told_from_one():
    from uda.data.rendered import handwritten_digits, render_digits

    xs, ys = render_digits(3000)
    xt, yt = (np.asarray(a) for a in handwritten_digits())
    keep = np.random.default_rng(1).random(len(yt)) < np.linspace(1.0, 0.05, 10)[yt]
    rows = (xs.reshape(3000, -1), ys), (np.float32(xt.reshape(len(yt), -1)[keep]), yt[keep])
    found = checked(inspect_shift(task(*rows)))
    assert found["verdict"]["setting"] == "both"
    assert found["verdict"]["adapt"] == "caution"
    assert not {"DANN", "DAN", "CORAL"} & set(found["methods"])


@pytest.mark.slow
def test_absent_classes_are_suspected(halves):
    (xs, ys), (xt, yt) = halves
    found = checked(inspect_shift(task((xs, ys), (xt[yt < 5], yt[yt < 5])), **FAST))
    assert found["verdict"]["setting"] == "label"
    assert found["verdict"]["absent_classes"] == ["5", "6", "7", "8", "9"]
    assert "different class sets suspected" in found["verdict"]["text"]
    assert "seems to lack 5 source classes" in texts(found, "advice", "class sets")


@pytest.mark.slow
def test_classes_of_the_target_alone_are_suspected(halves):
    (xs, ys), (xt, yt) = halves
    found = checked(inspect_shift(task((xs[ys < 5], ys[ys < 5]), (xt, yt)), **FAST))
    assert found["verdict"]["private_suspected"]
    assert found["verdict"]["setting"] == "covariate"
    assert not inspect_shift(task(*halves), **FAST)["verdict"]["private_suspected"]


# ------------------------------------------------------------------------------------------ real tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "source", "target"),
    [
        ({"path": "office_caltech10.npz", "x_key": "surf_{domain}_x", "y_key": "surf_{domain}_y",
          "normalise": "zscore"}, "A", "C"),
        ({"path": "pacs_efficientnet_lite0.npz"}, "art_painting", "cartoon"),
        ({"path": "amazon_minilm.npz", "normalise": "l2"}, "books", "dvd"),
    ],
)  # fmt: skip
def test_real_tasks_are_shifts(shared_data, reader, source, target):
    options = {**reader, "path": str(shared_data / reader["path"]), "kind": "features"}
    found = checked(inspect_shift(DataModule(Arrays(**options), source, target, seed=0)))
    assert found["verdict"]["setting"] in ("covariate", "both")
    assert found["shift"]["trees"]["pad_low"] > 0.5
    exact = found["duplicates"]["exact"]
    if source == "books":  # of the texts, 44 and 46 repeat an earlier one of their file
        assert (exact["source"], exact["target"], exact["across"]) == (44, 45, 0)
    if source == "A":
        assert found["features"]["centred_by_domain"]
        assert found["classifier"]["target"]["accuracy_atc"] < found["classifier"]["accuracy"] - 0.1


# ------------------------------------------------------------------------------------- what is not read


def test_target_labels_are_not_read(halves):
    (xs, ys), (xt, yt) = halves
    found = []
    for labels in (yt, np.random.default_rng(3).permutation(yt), np.full_like(yt, 7), None):
        one = inspect_shift(task((xs, ys), (xt, labels)), max_samples=200, permutations=99, draws=20)
        one.pop("seconds")
        found.append(one)
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0]["data"]["target"]["classes"] is None


def test_the_data_module_stays_as_it_was(halves):
    datamodule = task(*halves)
    inspect_shift(datamodule, max_samples=200, permutations=99, draws=20)
    assert datamodule._task is None
    assert datamodule.task.target.train.labels.min() >= 0


# ---------------------------------------------------------------------------------- features, sampling


def test_features_say_where_they_come_from():
    assert features.origin_of(make_backbone("identity")) == "inputs"
    assert features.origin_of(make_backbone("small_cnn")) == "random"
    assert features.origin_of(torch.nn.Flatten()) == "given"
    small = features.encoder_of_backbone(make_backbone("small_cnn"), (1, 8, 8))
    large = features.encoder_of_backbone(make_backbone("small_cnn"), (1, 80, 80))
    forced = features.encoder_of_backbone(make_backbone("small_cnn"), (1, 8, 8), "backbone")
    assert [e.origin for e in (small, large, forced)] == ["inputs", "random", "random"]
    assert "randomly initialised SmallCNN" in large.text
    x = torch.rand(3, 1, 8, 8)
    assert small.encode(x)[0].shape == (3, 64)
    assert forced.encode(x)[0].shape == (3, 256)


@pytest.mark.parametrize(("pretrained", "origin"), [(True, "pretrained"), (False, "random")])
def test_pretrained_weights_are_told_from_random_ones(monkeypatch, pretrained, origin):
    import timm

    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **more: real(name, pretrained=False, **more))
    from uda.nn.backbones import Timm

    assert features.origin_of(Timm("test_resnet.r160_in1k", pretrained=pretrained)) == origin


def test_rows_are_drawn_by_class_and_held_back_of_each():
    labels = np.repeat([0, 1, 2], [900, 90, 6])
    rows = features.draw(996, 100, seed=0, labels=labels)
    assert np.bincount(labels[rows]).tolist() == [90, 9, 5]
    fit, held = features.hold_back(np.array([0] * 10 + [1] * 2 + [2]), 0.4, seed=0)
    assert len(np.intersect1d(fit, held)) == 0
    assert (len(fit), len(held)) == (8, 5)
    assert 12 in fit
    assert features.draw(50, 100, 0).tolist() == list(range(50))
    assert features.draw(500, 100, 3).tolist() == features.draw(500, 100, 3).tolist()


def test_rows_that_are_not_finite_are_counted_and_left_out(halves):
    (xs, ys), (xt, yt) = halves
    xs = xs.copy()
    xs[[3, 8], 5] = np.nan
    found = inspect_shift(task((xs, ys), (xt, yt)), max_samples=2000, permutations=99, draws=20)
    assert (found["features"]["bad_source"], found["features"]["bad_target"]) == (2, 0)


@pytest.mark.slow
def test_several_sources(halves):
    (xs, ys), (xt, yt) = halves
    reader = Held(one=(xs[:450], ys[:450]), two=(xs[450:] * 0.5, ys[450:]), target=(xt, yt))
    found = checked(inspect_shift(DataModule(reader, ["one", "two"], "target", seed=0), permutations=99, draws=20))
    assert found["shift"]["sources"]["two"]["pad"] > found["shift"]["sources"]["one"]["pad"] + 0.5
    assert "two alone" in texts(found)


# ------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.slow
def test_a_checkpoint_serves_its_features_and_its_classifier(tmp_path, small_data, quiet_trainer, capsys):
    datamodule = small_data(source_val_fraction=0.3)
    model = UDA("mlp", bottleneck=8)
    trainer = quiet_trainer()
    trainer.fit(model, datamodule)
    path = tmp_path / "source.ckpt"
    trainer.save_checkpoint(path)
    model.eval()
    pools = datamodule.task.sources[0]
    x = pools.data.inputs.x[torch.from_numpy(pools.eval.rows)]
    accuracy = (model(x.float()).argmax(1) == pools.eval.labels).float().mean()
    words = "--data.reader=Generated --data.source=source --data.target=target --data.source_val_fraction=0.3"
    file = tmp_path / "found.json"
    assert main(["inspect", "--checkpoint", str(path), *words.split(), "--json", str(file), "--permutations=99"]) == 0
    found = checked(json.loads(file.read_text()))
    assert found["features"]["origin"] == "checkpoint"
    assert found["features"]["dimension"] == 8
    assert found["classifier"]["origin"] == "checkpoint"
    assert found["classifier"]["held_out_rows"] == len(x)
    assert found["classifier"]["accuracy"] == pytest.approx(float(accuracy), abs=1e-6)


# ---------------------------------------------------------------------------------------------- advice


@pytest.fixture(scope="module")
def figures(halves):
    """Figures of a covariate shift, to be changed one by one."""
    (xs, ys), (xt, yt) = halves
    return inspect_shift(task((xs, ys), (xt[:, ::-1].copy(), yt)), permutations=99, draws=20)


def changed(found, **sections):
    out = json.loads(json.dumps(found))
    for section, values in sections.items():
        for key, value in values.items():
            out[section][key] = {**out[section][key], **value} if isinstance(value, dict) else value
    return out


@pytest.mark.slow
def test_a_classifier_at_chance_is_warned_of(figures):
    target = {"accuracy_atc": 0.15, "accuracy_doc": 0.4}
    found = advice.advise(changed(figures, classifier={"target": target}))
    assert found["verdict"]["adapt"] == "no"
    assert "near chance on the target: 15.0%" in texts(found, "warning")
    found = advice.advise(changed(figures, classifier={"accuracy": 0.12}))
    assert "reaches 12.0% on held-out source rows" in texts(found, "warning")


@pytest.mark.slow
def test_little_to_gain_is_said(figures):
    accuracy = figures["classifier"]["accuracy"]
    target = {"accuracy_atc": accuracy, "accuracy_doc": accuracy + 0.01}
    found = advice.advise(changed(figures, classifier={"target": target}))
    assert "Little to gain" in texts(found, "warning")
    assert found["verdict"]["adapt"] == "caution"


def test_label_shift_beside_another_one_needs_more_than_lost_accuracy_explains(figures):
    accuracy = figures["classifier"]["accuracy"]
    far = {"total_variation": 0.4, "classes_apart": [0, 1]}
    figures = changed(figures, prior={"disagreement": 0.05})
    for test in ("linear", "trees"):
        figures["matched"][test] |= {"pad": 1.5, "p_value": 0.0}
    none_lost = {"accuracy_atc": accuracy, "accuracy_doc": accuracy}
    half_lost = {"accuracy_atc": accuracy / 2, "accuracy_doc": accuracy / 2}
    for target, kind in ((none_lost, "both"), (half_lost, "covariate")):
        one = changed(figures, classifier={"target": target}, prior={"bbse": far, "mlls": far})
        assert advice.advise(one)["verdict"]["setting"] == kind
    one = changed(figures, classifier={"target": none_lost}, prior={"bbse": far, "mlls": far})
    one["matched"]["trees"]["pad"] = 1.9
    assert "hardly overlap (proxy A-distance 1.90)" in texts(advice.advise(one), "advice", "looks like")
    one = changed(figures, classifier={"target": none_lost}, prior={"bbse": far, "mlls": far, "disagreement": 0.3})
    assert "the two estimates of the class shares differ by 0.30" in texts(advice.advise(one), "warning", "caution")


def test_label_shift_alone_needs_rows_enough_to_test(figures):
    far = {"total_variation": 0.4, "classes_apart": [0, 1]}
    one = changed(figures, prior={"bbse": far, "mlls": far, "disagreement": 0.05})
    for test in ("linear", "trees", "mmd"):
        one["matched"][test]["p_value"] = 0.5
    one["matched"]["source_rows"] = 300
    assert advice.advise(one)["verdict"]["setting"] == "label"
    one["matched"]["source_rows"] = 24
    assert advice.advise(one)["verdict"]["setting"] == "covariate"
    assert "only 24 source rows fit" in texts(advice.advise(one), "advice", "looks like")


def test_an_unknown_prior_is_said_with_its_reason(figures):
    one = changed(figures)
    one["prior"] = {k: one["prior"][k] for k in ("classes", "source")} | {"known": False, "why": "class 'a' has 0 rows"}
    one.pop("matched")
    assert "Not estimated: class 'a' has 0 rows" in texts(checked(advice.advise(one)))


def test_methods_are_installed_ones_in_order():
    plugins = {"MCC": ("closed", "partial", "multi-source"), "DANN": ("closed", "multi-source"), "Mdd": ("closed",),
               "CDAN": ("closed",), "Other": ("closed", "partial"), "OSBP": ("open",)}  # fmt: skip
    assert try_first("covariate", plugins) == ["MCC", "CDAN", "Mdd", "DANN"]
    assert try_first("covariate", plugins, several_sources=True) == ["MCC", "DANN"]
    assert try_first("partial", plugins) == ["MCC"]
    assert try_first("partial", {"Other": ("partial",), "DANN": ("closed",)}) == ["Other"]
    assert try_first("open", plugins) == ["OSBP"]
    assert try_first("none", plugins) == []
    for goal in ("label", "both", "partial", "open"):
        assert not {"DANN", "DAN", "CORAL"} & set(ORDER[goal])


# ---------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "needs data"),
        (["--checkpoint", "none.ckpt"], "none.ckpt"),
        (["--config", "configs/none.yaml"], "no file"),
        (["--data.reader=Generated", "--data.sauce=source"], "Did you mean 'source'"),
        (["--data.reader=Generated", "--data.target=target"], "data.source is missing"),
        (["--data.reader=Generated", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--max_samples=10", "--data.reader=Generated", "--data.source=source", "--data.target=target"], "50 or more"),
    ],
)
def test_bad_input_is_named(words, text):
    with pytest.raises(UDAError, match=re.escape(text)):
        main(["inspect", *words])


def test_help_of_all_commands_imports_nothing_of_it():
    code = "import sys, uda.cli as c; c.main(['-h']); print([m for m in sys.modules if m in ('uda.shift', 'torch')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "inspect" in done.stdout
    assert done.stdout.strip().endswith("[]")
