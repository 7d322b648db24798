"""The command ``uda fuse``: checkpoints in, a checkpoint out that tests, predicts and starts a run."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import uda_transport
import yaml
from torch import nn
from torch.nn import functional as F
from uda_transport.fuse import fuse_checkpoints
from uda_transport.fusion import fuse_modules

import uda
from uda.cli import main


class Changing(uda.Plugin):
    """Is a part of the network."""

    @uda.hookimpl
    def transform_features(self, features):
        return features


CONFIG = {
    "model": {
        "backbone": {"class_path": "uda.nn.SmallCNN", "init_args": {"widths": [6, 8]}}, "bottleneck": 12,
        "plugins": {"refine": {"class_path": "SlicedWasserstein"}},
    },
    "data": {
        "reader": {"class_path": "Digits", "init_args": {"n_rendered": 400}}, "source": "rendered",
        "target": "handwritten", "batch_size": 32, "epoch_steps": 4,
    },
    "trainer": {
        "max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two short runs from different seeds, with a plugin."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    for seed in (0, 1):
        words = ["--config", str(folder / "tiny.yaml"), f"--seed_everything={seed}", f"--run_dir={folder / str(seed)}"]
        assert main(["fit", *words]) == 0
    return folder


def checkpoint(folder, seed):
    return str(folder / str(seed) / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_from_checkpoints_to_figures(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a, b = checkpoint(runs, 0), checkpoint(runs, 1)
    words = ["--metric", "activations", "--batchnorm", "recalibrate", "--samples", "64", "-o", "out/f.ckpt"]
    assert main(["fuse", a, b, *words]) == 0
    told = capsys.readouterr().out
    assert "refine" in told
    assert "uda test --ckpt_path out/f.ckpt" in told
    assert main(["test", "--ckpt_path", "out/f.ckpt", "--trainer.enable_progress_bar=false"]) == 0
    assert 0 <= json.loads((tmp_path / "out" / "test.json").read_text())["target_accuracy"] <= 1
    assert main(["predict", "--ckpt_path", "out/f.ckpt", "--trainer.enable_progress_bar=false"]) == 0
    assert (tmp_path / "out" / "predictions.csv").is_file()
    model = uda.UDA.load_from_checkpoint("out/f.ckpt", weights_only=True)
    assert not model.plugins
    start = ["--config", str(runs / "tiny.yaml"), "--model.init_from=out/f.ckpt", "--trainer.max_steps=1"]
    assert main(["fit", *start, "--run_dir=next"]) == 0
    assert main(["fuse", a, b, "-o", "out/f.ckpt"]) == 2  # nothing is overwritten
    assert "--force" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_fuses_what_the_function_fuses(runs):
    paths = [checkpoint(runs, 0), checkpoint(runs, 1)]
    made = fuse_checkpoints(paths, weights=[0.25, 0.75])
    models = [uda.UDA.load_from_checkpoint(p, weights_only=True) for p in paths]
    parts = [nn.ModuleDict({n: getattr(m, n) for n in ("backbone", "bottleneck", "head")}) for m in models]
    fused = fuse_modules([nn.Sequential(*p.values()) for p in parts], weights=[0.25, 0.75])
    assert set(made["state_dict"]) == set(parts[0].state_dict())
    for (name, mine), theirs in zip(made["state_dict"].items(), fused.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(("change", "told"), [
    (lambda c: c["hyper_parameters"].update(class_names=["x"] * 10), "classes"),
    (lambda c: c["hyper_parameters"].update(plugins={"a": {"class_path": "uda_transport.Changing"}}), "'a'"),
    (lambda c: c["state_dict"].pop("backbone.net.0.weight"), "does not load"),
    (lambda c: c.pop("hyper_parameters"), "no checkpoint of uda fit"),
])  # fmt: skip
def test_what_cannot_be_fused_is_told(runs, tmp_path, monkeypatch, change, told):
    monkeypatch.setattr(uda_transport, "Changing", Changing, raising=False)
    other = torch.load(checkpoint(runs, 1), weights_only=True)
    change(other)
    torch.save(other, tmp_path / "other.ckpt")
    with pytest.raises(uda.UDAError, match=told):
        fuse_checkpoints([checkpoint(runs, 0), str(tmp_path / "other.ckpt")])


def test_words_are_checked_before_anything_is_read(runs, tmp_path, capsys):
    a = checkpoint(runs, 0)
    for words, told in [([a], "two"), ([a, str(tmp_path / "none.ckpt")], "none.ckpt")]:
        assert main(["fuse", *words, "-o", str(tmp_path / "x.ckpt")]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x.ckpt").exists()


def trained_on_digits(seed):
    """An MLP on half of scikit-learn's digits; its accuracy on the other half."""
    from sklearn.datasets import load_digits

    x, y = (torch.tensor(np.asarray(v)) for v in load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(net(x[::2]), y[::2]).backward()
        optimiser.step()

    def accuracy(other):
        return float((other.eval()(x[1::2]).argmax(1) == y[1::2]).double().mean())

    return net.eval(), accuracy, x[::2]


def test_fusion_is_far_better_than_plain_averaging():
    (one, accuracy, x), (two, _, _) = trained_on_digits(0), trained_on_digits(1)
    alone = min(accuracy(one), accuracy(two))
    plain = accuracy(fuse_modules([one, two], align=False))
    fused = accuracy(fuse_modules([one, two]))
    recalibrated = accuracy(
        fuse_modules([one, two], metric="activations", samples=x[:200], batchnorm="recalibrate")
    )
    assert alone > 0.93
    assert 1 - fused < (1 - plain) / 2  # less than half of its errors
    assert recalibrated > 0.9
