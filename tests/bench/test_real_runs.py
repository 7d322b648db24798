"""Suites with real runs: a process each, kills, two at once, failures, submitit, and tuning."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from uda.bench.ledger import Ledger
from uda.cli import main

pytestmark = pytest.mark.slow

BASE = {
    "model": {"backbone": "identity", "bottleneck": 8},
    "data": {
        "reader": {"class_path": "Generated", "init_args": {"n": 64}}, "source": "source", "target": "target",
        "batch_size": 16, "epoch_steps": 25,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_progress_bar": False},
}  # fmt: skip
METHODS = {
    "plain": {},
    "dann": {"plugins": {"align": {"class_path": "DANN", "init_args": {"hidden": 8}}}},
    "mcc": {"plugins": {"refine": {"class_path": "MCC"}}},
}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))

    def write(**changes) -> str:
        spec = {
            "name": "real",
            "base": "base.yaml",
            "seeds": [0, 1],
            "tasks": {"s->t": {}},
            "methods": METHODS,
            "threads": 1,
        }
        path = tmp_path / "real.yaml"
        path.write_text(yaml.safe_dump({**spec, **changes}))
        return str(path)

    return write


LEDGER = Path("runs/bench/real/ledger.jsonl")


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "uda.cli", "bench", "run", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def figures(records) -> dict:
    return {(r["method"], r["seed"]): (r["metrics"], r["scores"]) for r in records if r["status"] == "finished"}


def test_runs_then_a_bad_one_then_nothing_to_do(suite, capfd):
    broken = {
        **METHODS,
        "broken": {"overrides": {"data.source": "sauce"}},
        "typo": {"plugins": {"a": "DANNN"}},
    }
    assert main(["bench", "run", suite(methods=broken, seeds=[0])]) == 1
    records = {r["method"]: r for r in Ledger(LEDGER).read()}
    assert records["broken"]["status"] == records["typo"]["status"] == "failed"
    assert "sauce" in records["broken"]["error"]
    assert "Did you mean 'DANN'" in records["typo"]["error"]
    for name in METHODS:
        line = records[name]
        assert line["status"] == "finished"
        assert line["steps"] == 50
        assert line["seconds"] > 0
        assert line["peak_memory_mib"] > 0
        assert line["config"]["model"]["bottleneck"] == 8
        assert line["config"]["seed_everything"] == 0
        assert line["versions"]["torch"]
        assert 0 <= line["metrics"]["target_accuracy"]["selected"] <= 1
        assert line["scores"]["im"]["last"] is not None
    capfd.readouterr()
    assert main(["bench", "run", suite(seeds=[0])]) == 0
    assert "0 runs finished" in capfd.readouterr().out
    assert main(["bench", "table", str(LEDGER)]) == 0


def test_a_run_starts_from_the_checkpoint_of_another(suite):
    methods = {
        "adapted": {"plugins": {"refine": {"class_path": "SHOT"}}, "init_from": "plain", "source": None},
        "plain": {},
    }
    path = suite(methods=methods, seeds=[0], overrides={"trainer.enable_checkpointing": False})
    assert main(["bench", "run", path, "--workers", "2"]) == 0
    plain, adapted = Ledger(LEDGER).read()
    assert (plain["method"], adapted["method"]) == ("plain", "adapted")
    assert adapted["config"]["model"]["init_from"] == f"plain/{plain['key']}/last.ckpt"
    assert "source" not in adapted["config"]["data"]
    (log,) = Path("runs/bench/real/s-t/adapted").glob("*.log")
    assert "taken from last.ckpt" in log.read_text()
    assert str(Path.cwd()) not in LEDGER.read_text()


def test_a_forked_run_equals_a_run_by_hand(suite, tmp_path):
    assert main(["bench", "run", suite(seeds=[1]), "--only", "dann"]) == 0
    (line,) = Ledger(LEDGER).read()
    config = next(Path("runs/bench/real").rglob("seed1-*.yaml"))
    command = [
        sys.executable,
        "-m",
        "uda.cli",
        "fit",
        "--config",
        str(config),
        "--seed_everything=1",
        "--run_dir",
        "by_hand",
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    summary = json.loads(Path("by_hand/summary.json").read_text())
    assert summary["target_accuracy"] == line["metrics"]["target_accuracy"]
    assert summary["scores"] == line["scores"]
    assert summary["config_hash"] == line["config_hash"]


def test_a_killed_suite_goes_on_without_loss(suite):
    path = suite(overrides={"trainer.max_epochs": 20})
    process = start(path)
    wait_for(lambda: len(Ledger(LEDGER).finished()) >= 1)
    wait_for(lambda: any(Path("runs").rglob("last.ckpt")) and list(Path(f"{LEDGER}.claims").glob("*.json")) != [])
    process.kill()
    process.wait()
    before = len(Ledger(LEDGER).finished())
    assert before < 6
    second = start(path)
    out, _ = second.communicate(timeout=240)
    assert second.returncode == 0, out
    records = Ledger(LEDGER).read()
    assert len(records) == 6
    assert len({r["key"] for r in records}) == 6
    assert all(r["status"] == "finished" and r["steps"] == 500 for r in records)


def test_ctrl_c_stops_between_batches_and_is_no_failure(suite):
    path = suite(overrides={"trainer.max_epochs": 500}, seeds=[0], methods={"plain": {}})
    process = start(path)
    wait_for(lambda: any(Path("runs").rglob("last.ckpt")))
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert Ledger(LEDGER).read() == []
    assert list(Path(f"{LEDGER}.claims").glob("*.json")) == []


def test_two_suites_at_once(suite):
    path = suite()
    calls = [start(path), start(path)]
    outs = [c.communicate(timeout=300)[0] for c in calls]
    assert [c.returncode for c in calls] == [0, 0], outs
    records = Ledger(LEDGER).read()
    assert len(records) == len({r["key"] for r in records}) == 6
    assert sum(int(out.rsplit(" runs finished", 1)[0].split()[-1]) for out in outs) == 6


def test_a_run_that_dies_takes_nothing_with_it(suite):
    methods = {"plain": {}, "dies": {"plugins": {"a": {"class_path": "dying.Dying"}}}, "mcc": METHODS["mcc"]}
    Path("dying.py").write_text(
        "import os, signal, uda\n\n\nclass Dying(uda.Plugin):\n    @uda.hookimpl\n"
        "    def align_features(self, step):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run(
        [sys.executable, "-m", "uda.cli", "bench", "run", suite(methods=methods, seeds=[0])],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert process.returncode == 1, process.stderr
    records = {r["method"]: r for r in Ledger(LEDGER).read()}
    assert records["dies"]["exit_code"] == -9
    assert records["plain"]["status"] == records["mcc"]["status"] == "finished"


@pytest.mark.parametrize("cluster", ["debug", "local"])
def test_jobs_by_submitit(suite, cluster, capfd):
    pytest.importorskip("submitit")
    path = suite(seeds=[0], methods={"plain": {}, "broken": {"overrides": {"data.source": "sauce"}}})
    assert main(["bench", "run", path, "--executor", "submitit", "--cluster", cluster]) == 1
    records = {r["method"]: r for r in Ledger(LEDGER).read()}
    assert records["plain"]["status"] == "finished"
    assert "sauce" in records["broken"]["error"]
    assert main(["bench", "run", path, "--executor", "submitit", "--cluster", cluster, "--only", "plain"]) == 0
    assert len(Ledger(LEDGER).read()) == 2


def test_tuning_with_real_runs(suite, capfd):
    pytest.importorskip("optuna")
    assert main(["bench", "tune", suite(), "--plugin", "refine", "--method", "mcc", "--trials", "3"]) == 0
    out = capfd.readouterr().out
    assert "best of 3 by transfer_score" in out
    assert "--model.plugins.refine.weight=" in out
