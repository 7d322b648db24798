"""``uda continual``: weights are handed on, a stopped sequence equals an undisturbed one, nothing is overwritten."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch
import yaml
from uda_testtime.continual import command as continual
from uda_testtime.continual.plan import Plan, composed

from uda.cli import main
from uda.errors import UDAError

METHOD = {"model": {"plugins": {"refine": {"class_path": "SHOT"}}}}
GENERAL = {"model": {"plugins": {"generalise": {"class_path": "CoDAG"}}}, "trainer": {"max_epochs": 1}}


@pytest.fixture
def words(tmp_path):
    """The command on a tiny task, less the methods: ``words(*more)``."""
    config = {
        "model": {"backbone": {"class_path": "uda.nn.MLP", "init_args": {"hidden": [8]}}, "bottleneck": 4},
        "data": {
            "reader": {"class_path": "uda.testing.TinyTask", "init_args": {"sources": 2}}, "source": "source",
            "target": "target", "batch_size": 8, "epoch_steps": 2,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
    }  # fmt: skip
    for name, content in (("tiny", config), ("method", METHOD), ("general", GENERAL)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def make(*more: str) -> list[str]:
        return ["continual", "--config", str(tmp_path / "tiny.yaml"), "--config", str(tmp_path / "method.yaml"),
                "--shifts", "source2", "target", "--in_process", *more]  # fmt: skip

    return make


def weights(path):
    state = torch.load(path, weights_only=True)["state_dict"]
    return {k: v for k, v in state.items() if not k.startswith("plugins.")}


@pytest.mark.slow
def test_a_sequence_stops_and_goes_on(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    general = ("-o", str(out), "--generalise", str(tmp_path / "general.yaml"), "--memory", "12")
    assert main(words(*general)) == 0
    assert "TDA" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"] == ["source", "source2", "target"]
    assert set(summary["oracle_adapted"]) == {"source2", "target"}
    with (out / "accuracies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["target"]) for r in rows] == [r["target"] for r in summary["oracle_accuracies"]]
    stage = out / "1-source2"
    memory = torch.load(stage / "memory.pt", weights_only=True)
    assert memory["domain"].unique().tolist() == [0, 1]
    assert len(memory["y"]) <= 12
    assert len(torch.load(stage / "labels.pt", weights_only=True)["y"]) == 48
    starts = [yaml.safe_load((stage / f"{n}.yaml").read_text())["model"]["init_from"] for n in ("adapt", "generalise")]
    assert starts == [summary["checkpoints"][0]] * 2  # both start from the model that generalised before

    first, last = summary["checkpoints"][1:]
    kept, name, before = weights(last), "bottleneck.net.0.weight", (stage / "measured.json").stat().st_mtime_ns
    assert not torch.equal(weights(first)[name], kept[name])
    for name in ("generalise", "measured.json", "memory.pt"):  # as if it had been stopped in the last fit
        path = out / "2-target" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (out / "summary.json").unlink()
    (out / "accuracies.csv").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(continual, "here", lambda argv: 130)
        assert main(words(*general, "--resume")) == 130
    assert "--resume" in capsys.readouterr().err
    assert main(words(*general, "--resume")) == 0
    assert json.loads((out / "summary.json").read_text()) == summary
    assert all(torch.equal(v, kept[k]) for k, v in weights(last).items())
    assert (stage / "measured.json").stat().st_mtime_ns == before
    assert main(words(*general)) == 2
    assert main(words(*general[:-1], "24", "--resume")) == 2
    assert "another memory" in capsys.readouterr().err

    source = summary["checkpoints"][0]  # a method alone, from a given model
    one = tmp_path / "one"
    assert main(words("-o", str(one), f"--model.init_from={source}", "--shifts", "target")) == 0
    plain = json.loads((one / "summary.json").read_text())
    assert plain["oracle_adapted"] is None
    assert plain["oracle_accuracies"][0]["target"] == summary["oracle_accuracies"][0]["target"]
    assert plain["checkpoints"][0] == source
    assert not (one / "0-source" / "fit").exists()
    assert yaml.safe_load((one / "1-target" / "fit.yaml").read_text())["model"]["plugins"].keys() == {"refine"}


def test_a_first_fit_that_is_refused_leaves_nothing(words, tmp_path, monkeypatch):
    monkeypatch.setattr(continual, "here", lambda argv: 2)
    assert main(words("-o", str(tmp_path / "out"))) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [(["--memory", "0"], "--memory"), (["--resume"], "no "), (["--data.bach_size=3"], "batch_size"),
     (["--shifts", "target", "target"], "twice"), (["--shifts", "source"], "is a source"),
     (["--shifts", "nowhere"], "nowhere"), (["nowhere"], "options"), (["--model.bottleneck"], "value"),
     (["--generalise", "none.yaml"], "none.yaml")],
)  # fmt: skip
def test_errors_come_before_the_first_fit(words, tmp_path, capsys, monkeypatch, more, told):
    monkeypatch.setattr(continual, "here", lambda argv: pytest.fail("a fit was started"))
    assert main([*words("-o", str(tmp_path / "out")), *more]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_generalising_overlay_needs_a_plugin_that_takes_the_labels(words, tmp_path):
    given, shifts = words()[1:5], ["target"]
    with pytest.raises(UDAError, match="no plugin of it takes labels"):
        Plan.make(given, shifts, str(tmp_path / "method.yaml"), 9, None)
    with pytest.raises(UDAError, match="needs a method"):
        Plan.make(given[:2], shifts, str(tmp_path / "general.yaml"), 9, None)
    plan = Plan.make([*given, "--seed_everything=4"], shifts, str(tmp_path / "general.yaml"), 9, None)
    assert plan.out.parts == ("runs", "continual_tiny_method_general", "seed4")
    assert plan.general["trainer"]["max_epochs"] == 1
    assert list(plan.general["model"]["plugins"]) == ["generalise"]


def test_overrides_are_laid_over_the_configs(words):
    config, files = composed([*words()[1:5], "--model.plugins.refine.label_weight=0.5", "--data.batch_size", "4"])
    assert config["model"]["plugins"]["refine"] == {"class_path": "SHOT", "init_args": {"label_weight": 0.5}}
    assert config["data"]["batch_size"] == 4
    assert len(files) == 2


def test_several_processes_are_refused(words, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(words()) == 2
    assert "starts the fits itself" in capsys.readouterr().err
