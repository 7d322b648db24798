"""The run directory, its summary, and evaluation and prediction beside it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import ClassVar

import lightning as L
import pytest
import torch
import yaml

import uda
from uda.cli import main
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.run import RunSummary, config_hash
from uda.run.directory import RunDirectory, default_base, newest_checkpoint, run_of_checkpoint
from uda.run.logs import RunCSVLogger

CONFIG = {
    "model": {
        "backbone": "mlp",
        "bottleneck": 8,
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2, "momentum": 0.9}},
        "plugins": {"align": {"class_path": "DANN", "init_args": {"hidden": 8}}},
    },
    "data": {
        "reader": {"class_path": "Generated", "init_args": {"n": 64}},
        "source": "source",
        "target": "target",
        "batch_size": 16,
        "epoch_steps": 15,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def fast(params):
    return torch.optim.SGD(params, lr=0.2, momentum=0.9)


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_leaves_everything(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--checkpoint_every", "2"]) == 0
    first = here / "runs" / "tiny" / "seed0"
    out = capsys.readouterr().out
    assert "target labels: report only" in out
    assert f"{DEFAULT_SCORE} (label-free)" in out
    names = {str(p.relative_to(first)) for p in first.rglob("*") if "tfevents" not in p.name}
    assert names >= {
        "config.yaml", "run.json", "summary.json", "logs/metrics.csv", "checkpoints/last.ckpt",
        "checkpoints/selected.ckpt",
    }  # fmt: skip
    assert list((first / "logs").glob("events*"))
    summary = load(first / "summary.json")
    assert (summary["steps"], summary["epochs"], summary["seed"]) == (30, 2, 0)
    assert summary["selection"]["score"] == DEFAULT_SCORE
    for kind in ("target_accuracy", "target_class_accuracy"):
        assert set(summary[kind]) == {"last", "selected", "oracle"}
        assert all(0 <= v <= 1 for v in summary[kind].values())
    assert summary["target_accuracy"]["oracle"] >= summary["target_accuracy"]["selected"]
    assert summary["versions"]["uda-adversarial"]
    assert summary["plugins"]["align"]["init_args"]["hidden"] == 8
    assert summary["peak_memory_mib"] > 0


@pytest.mark.slow
def test_a_run_can_be_repeated_resumed_and_evaluated(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--checkpoint_every", "2"]) == 0
    first = here / "runs" / "tiny" / "seed0"
    summary = load(first / "summary.json")

    # the saved config repeats the run, in a directory of its own, with the same hash and weights
    assert main(["fit", "--config", str(first / "config.yaml")]) == 0
    second = here / "runs" / "tiny" / "seed0-2"
    assert "seed0-2" in capsys.readouterr().out
    again = load(second / "summary.json")
    assert again["config_hash"] == summary["config_hash"]
    one, two = (
        torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (first, second)
    )
    assert all(torch.equal(v, two[k]) for k, v in one.items() if isinstance(v, torch.Tensor))

    # a directory in use is refused, unless the run is resumed
    assert main(["fit", "--config", "tiny.yaml", "--run_dir", str(second)]) == 2
    assert "not empty" in capsys.readouterr().err
    # what is no directory is refused before anything is built
    assert main(["fit", "--config", "tiny.yaml", "--run_dir", str(second / "summary.json" / "run")]) == 2
    assert f"{second / 'summary.json'} is a file, not a folder" in capsys.readouterr().err
    last = second / "checkpoints" / "last.ckpt"
    assert main(["fit", "--ckpt_path", str(last), "--trainer.max_epochs=3"]) == 0
    resumed = load(second / "summary.json")
    assert (resumed["steps"], resumed["epochs"]) == (45, 3)
    assert resumed["seconds"] > again["seconds"]
    with (second / "logs" / "metrics.csv").open() as file:
        steps = [int(r["step"]) for r in csv.DictReader(file) if r["select/im"]]
    assert steps == [14, 29, 44]
    record = load(second / "run.json")
    assert [s["resumed"] is None for s in record["starts"]] == [True, False]
    assert (second / "config-2.yaml").is_file()  # other settings than the first start's: both are kept

    # evaluation and prediction go beside the checkpoint's run, and never overwrite
    selected = str(second / "checkpoints" / "selected.ckpt")
    assert main(["test", "--ckpt_path", selected]) == 0
    assert main(["test", "--ckpt_path", selected]) == 0
    assert load(second / "test.json") == {
        **load(second / "test-2.json"),
        "peak_memory_mib": load(second / "test.json")["peak_memory_mib"],
    }
    assert load(second / "test.json")["target_accuracy"] == pytest.approx(
        resumed["target_accuracy"]["selected"]
    )
    assert main(["validate", "--ckpt_path", selected]) == 0
    assert load(second / "validate.json")["select"][DEFAULT_SCORE] == pytest.approx(
        resumed["selection"]["value"], abs=1e-5
    )
    assert main(["predict", "--run_dir", str(second), "--ckpt_path", "last", "--probabilities", "true"]) == 0
    with (second / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["index"]) for r in rows] == list(range(64))
    assert rows[5]["id"] == "target/5"
    assert {r["label"] for r in rows} <= {"0", "1"}
    assert all(float(r["score"]) == pytest.approx(max(float(r["p(0)"]), float(r["p(1)"]))) for r in rows)


def test_a_failed_start_leaves_no_directory(here: Path) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--data.batch_size=6400"]) == 2
    assert not (here / "runs").exists()


def test_nothing_is_chosen_by_target_labels(here: Path, capsys: pytest.CaptureFixture) -> None:
    callback = {"class_path": "EarlyStopping", "init_args": {"monitor": "oracle/target_accuracy"}}
    assert main(["fit", "--config", "tiny.yaml", f"--trainer.callbacks={json.dumps([callback])}"]) == 2
    assert "target labels" in capsys.readouterr().err
    assert not (here / "runs").exists()


def test_a_requeued_job_goes_on_in_its_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    chosen = RunDirectory.for_fit(None, None, ["x.yaml"], 0)
    chosen.claim(["uda", "fit"])
    (chosen.path / "checkpoints").mkdir()
    (chosen.path / "checkpoints" / "last.ckpt").touch()
    again = RunDirectory.for_fit(None, None, ["x.yaml"], 0)
    assert again.path.absolute() == chosen.path
    assert again.resume.name == "last.ckpt"
    assert RunDirectory.for_fit(str(chosen.path), None, [], 0).resume.name == "last.ckpt"
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert RunDirectory.for_fit(None, None, ["x.yaml"], 0).path.name == "seed0-2"
    with pytest.raises(uda.UDAError, match="not empty"):
        RunDirectory.for_fit(str(chosen.path), None, [], 0)


def test_other_ranks_find_the_directory_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    monkeypatch.delenv("UDA_RUN_DIR", raising=False)
    monkeypatch.setenv("RANK", "0")
    Path("runs/x/seed0").mkdir(parents=True)
    Path("runs/x/seed0/taken").touch()
    chosen = RunDirectory.for_fit(None, None, ["x.yaml"], 0)
    chosen.claim(["uda", "fit"])
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("UDA_RUN_DIR")
    assert RunDirectory.for_fit(None, None, ["x.yaml"], 0).path.absolute() == chosen.path
    assert chosen.path.name == "seed0-2"


def test_a_checkpoint_of_another_run_does_not_go_on_here(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "checkpoints" / "last.ckpt").touch()
    checkpoint = tmp_path / "one" / "checkpoints" / "last.ckpt"
    assert run_of_checkpoint(checkpoint) == tmp_path / "one"
    assert RunDirectory.for_fit(None, str(checkpoint), [], 0).path == tmp_path / "one"
    with pytest.raises(uda.UDAError, match="another run"):
        RunDirectory.for_fit(str(tmp_path / "two"), str(checkpoint), [], 0)
    assert newest_checkpoint(tmp_path / "one") == checkpoint


def test_the_name_of_a_run_comes_from_its_configs(tmp_path: Path) -> None:
    assert default_base(["a/data.yaml", "b/dann.yaml"], 3) == Path("runs/data_dann/seed3")
    assert default_base([], 0) == Path("runs/run/seed0")
    run = tmp_path / "digits" / "seed0"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    assert default_base([str(run / "config.yaml")], 1) == Path("runs/digits/seed1")


def test_the_config_hash_ignores_what_changes_no_weight() -> None:
    config = {
        "seed_everything": 0,
        "model": {"bottleneck": 8},
        "data": {"reader": {"init_args": {"root": "/a"}}, "num_workers": 1},
        "trainer": {"max_epochs": 2, "logger": None, "default_root_dir": "/x"},
        "run_dir": "/y",
    }
    other = json.loads(json.dumps(config))
    other["data"] |= {"reader": {"init_args": {"root": "/b"}}, "num_workers": 4}
    other["trainer"] |= {"logger": False, "default_root_dir": "/z"}
    other["run_dir"] = None
    assert config_hash(config) == config_hash(other)
    for section, change in (
        ("model", {"bottleneck": 9}),
        ("trainer", {"max_epochs": 3}),
        ("data", {"batch_size": 1}),
    ):
        assert config_hash({**config, section: {**config[section], **change}}) != config_hash(config)
    assert config_hash({**config, "seed_everything": 1}) != config_hash(config)


def test_the_summary_from_python_selects_without_labels(small_data, quiet_trainer, tmp_path: Path) -> None:
    summary = RunSummary(tmp_path / "out", show=False)
    data = small_data(epoch_steps=15)
    quiet_trainer(callbacks=[summary], max_epochs=3).fit(
        uda.UDA(backbone="mlp", bottleneck=8, optimizer=fast), datamodule=data
    )
    written = load(tmp_path / "out" / "summary.json")
    assert written == summary.summary
    scores = [row[f"select/{DEFAULT_SCORE}"] for row in summary.history]
    best = scores.index(max(scores))
    assert written["selection"]["epoch"] == best
    assert written["target_accuracy"]["selected"] == pytest.approx(
        summary.history[best]["oracle/target_accuracy"], abs=1e-6
    )
    assert written["config_hash"] is None
    with pytest.raises(uda.UDAError, match="'im'"):
        RunSummary(select_by="imm")


def test_an_unlabelled_target_has_null_accuracies(quiet_trainer, tmp_path: Path) -> None:
    x, y = torch.randn(64, 2), torch.arange(64) % 2
    source = torch.utils.data.TensorDataset(x, y)
    target = torch.utils.data.TensorDataset(torch.randn(64, 2))
    data = uda.DataModule.from_datasets(source, target, batch_size=16, epoch_steps=15)
    summary = RunSummary(tmp_path, show=True)
    quiet_trainer(callbacks=[summary]).fit(
        uda.UDA(backbone="mlp", bottleneck=8, optimizer=fast), datamodule=data
    )
    written = load(tmp_path / "summary.json")
    assert written["target_accuracy"] == {"last": None, "selected": None, "oracle": None}
    assert written["selection"]["epoch"] is not None
    assert written["source_accuracy"] is not None


@pytest.mark.filterwarnings("ignore:The predictions have collapsed")
def test_collapsed_validations_are_not_selected(quiet_trainer, tmp_path: Path) -> None:
    summary = RunSummary(tmp_path, select_by="entropy")
    figures = [(0.3, -0.4, 0), (0.9, -0.1, 1), (0.5, -0.2, 0)]
    for epoch, (accuracy, entropy, collapsed) in enumerate(figures):
        row = {"epoch": epoch, "step": epoch, "oracle/target_accuracy": accuracy, "select/entropy": entropy}
        summary.history.append({**row, "select/collapsed": collapsed})
    made = summary.make(quiet_trainer(), torch.nn.Linear(1, 1))
    assert made["selection"] == {"score": "entropy", "epoch": 2, "step": 2, "value": -0.2}
    assert made["target_accuracy"] == {"last": 0.5, "selected": 0.5, "oracle": 0.9}


def test_metrics_go_on_after_a_resume(tmp_path: Path) -> None:
    logger = RunCSVLogger(tmp_path)
    for step in range(4):
        logger.log_metrics({"a": step}, step)
        logger.save()
    logger = RunCSVLogger(tmp_path)
    logger.experiment.forget_after(2)
    logger.log_metrics({"b": 9.0}, 2)
    logger.save()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["a"], r["b"], r["step"]) for r in rows] == [("0", "", "0"), ("1", "", "1"), ("", "9.0", "2")]


@pytest.mark.slow
def test_adapting_plugins_turn_inference_mode_off(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from uda.plugin import Plugin, hookimpl

    class Adapts(Plugin):
        """Gradients on, while testing."""

        seen: ClassVar[list[bool]] = []

        @hookimpl
        def adapt(self, model, batch):
            Adapts.seen.append(batch.logits.requires_grad and not torch.is_inference_mode_enabled())

    module = type(sys)("tests_adapts")
    module.Adapts = Adapts
    Adapts.__module__, Adapts.__qualname__ = "tests_adapts", "Adapts"
    monkeypatch.setitem(sys.modules, "tests_adapts", module)
    words = ["--config", "tiny.yaml", '--model.plugins={"tta": {"class_path": "tests_adapts.Adapts"}}']
    assert main(["fit", *words, "--run_dir", "run"]) == 0
    assert Adapts.seen == []
    assert main(["test", "--run_dir", "run", "--ckpt_path", "last"]) == 0
    assert Adapts.seen
    assert all(Adapts.seen)


def test_summary_state_travels_with_checkpoints() -> None:
    one, two = RunSummary(), RunSummary()
    one.history, one._before = [{"epoch": 0, "step": 4}], 12.5
    two.load_state_dict(one.state_dict())
    assert two.history == one.history
    assert two.seconds == 12.5
    assert isinstance(two, L.Callback)
