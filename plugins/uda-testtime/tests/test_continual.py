"""``uda continual``: weights are handed on, a stopped sequence equals an undisturbed one, nothing is overwritten."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from uda_testtime.continual import command as continual
from uda_testtime.continual.plan import Plan, composed
from uda_testtime.continual.stages import Sequence

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


def pretended(fits, checkpoint):
    """Fits that train nothing: they take note of their config, and leave a given checkpoint."""

    def fit(argv):
        folder = Path(argv[argv.index("--run_dir") + 1])
        fits[f"{folder.parent.name}/{folder.name}"] = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(checkpoint, folder / "checkpoints" / "last.ckpt")
        (folder / "summary.json").write_text("{}")
        return 0

    return fit


def measured(sequence, checkpoint, stage, adapted=None):
    """In the place of a pass over all domains."""
    figures = dict.fromkeys(sequence.plan.shifts, 0.5)
    return {"checkpoint": checkpoint, "source_accuracy": 0.5, "oracle_accuracy": figures}


@pytest.mark.slow
def test_a_sequence_stops_and_goes_on(words, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    general = ("-o", str(out), "--shifts", "target", "--generalise", str(tmp_path / "general.yaml"), "--memory", "12")
    real, seen = Sequence.accuracy, []

    def accuracy(sequence, model, name):
        found = real(sequence, model, name)
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "accuracy", accuracy)
        assert main(words(*general)) == 0
    assert "TDA" in capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["stages"] == ["source", "target"]
    assert set(summary["oracle_adapted"]) == {"target"}
    fits = [out / n for n in ("0-source/fit", "1-target/generalise", "1-target/adapt")]
    for state, fit in zip(seen, fits, strict=True):  # what was measured is what the fit came to
        assert all(torch.equal(v, state[k]) for k, v in weights(fit / "checkpoints" / "last.ckpt").items())
    reached = [json.loads((fit / "summary.json").read_text())["target_accuracy"]["last"] for fit in fits]
    assert [r["target"] for r in summary["oracle_accuracies"]] == pytest.approx(reached[:2], abs=1e-5)
    with (out / "accuracies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["target"]) for r in rows] == [r["target"] for r in summary["oracle_accuracies"]]
    stage = out / "1-target"
    memory = torch.load(stage / "memory.pt", weights_only=True)
    assert memory["domain"].unique().tolist() == [0, 1]
    assert len(memory["y"]) <= 12
    assert len(torch.load(stage / "labels.pt", weights_only=True)["y"]) == 48
    first, last = summary["checkpoints"]
    kept, before = weights(last), (stage / "adapt" / "summary.json").stat().st_mtime_ns
    assert not torch.equal(weights(first)["bottleneck.net.0.weight"], kept["bottleneck.net.0.weight"])
    for name in ("generalise", "measured.json", "memory.pt"):  # as if it had been stopped in the last fit
        path = stage / name
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
    assert (stage / "adapt" / "summary.json").stat().st_mtime_ns == before
    assert main(words(*general)) == 2
    assert main(words(*general[:-1], "24", "--resume")) == 2
    assert "another memory" in capsys.readouterr().err

    for more, names in ((general[4:], ("adapt", "generalise")), ((), ("fit",))):  # who starts from whom, two domains
        fits: dict[str, dict] = {}
        with monkeypatch.context() as patch:
            patch.setattr(continual, "here", pretended(fits, last))
            patch.setattr(Sequence, "measure", measured)
            chain = tmp_path / names[0]
            assert main(words("-o", str(chain), f"--model.init_from={first}", *more)) == 0
        assert list(fits) == [f"{stage}/{n}" for stage in ("1-source2", "2-target") for n in names]
        starts = [fits[f"1-source2/{n}"]["model"]["init_from"] for n in names]
        assert starts == [first] * len(names)  # both from the model that generalised before
        handed = str(chain / "1-source2" / names[-1] / "checkpoints" / "last.ckpt")
        assert [fits[f"2-target/{n}"]["model"]["init_from"] for n in names] == [handed] * len(names)
        assert [c["data"]["target"] for c in fits.values()] == ["source2"] * len(names) + ["target"] * len(names)
        assert list(fits["1-source2/" + names[0]]["model"]["plugins"]) == ["refine"]
        found = json.loads((chain / "summary.json").read_text())
        assert found["checkpoints"][:2] == [first, handed]
        given = list(fits.values())[-1]["model"]["plugins"].get("generalise")
        assert not more or given["init_args"] == {
            "labels": str(chain / "2-target" / "labels.pt"), "memory": str(chain / "1-source2" / "memory.pt")
        }  # fmt: skip


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
