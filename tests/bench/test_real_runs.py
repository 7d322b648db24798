"""Suites with real runs: a process each, kills, two at once, failures, submitit, and tuning."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from uda.bench.ledger import Ledger
from uda.cli import main
from uda.testing import forks

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


class Started:
    """``uda bench run WORDS`` in a fork, whose runs come from the server that is warm already."""

    def __init__(self, *words: str, environment: dict[str, str] | None = None) -> None:
        self.log = Path(tempfile.mkdtemp(dir=".")) / "out"
        env = {**forks.clean_environment(), **(environment or {})}
        self.process = forks.start(
            forks.command, ["bench", "run", *words], output=self.log, environment=env, folder=Path.cwd()
        )

    def end(self, seconds: float = 300.0) -> tuple[int, str]:
        """Exit code and output."""
        self.process.join(seconds)
        forks.stop(self.process)
        return self.process.exitcode, self.log.read_text()


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
    words = ["fit", "--config", str(config), "--seed_everything=1", "--run_dir", "by_hand"]
    done = forks.run(forks.command, words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path("by_hand/summary.json").read_text())
    assert summary["target_accuracy"] == line["metrics"]["target_accuracy"]
    assert summary["scores"] == line["scores"]
    assert summary["config_hash"] == line["config_hash"]


def test_a_killed_suite_goes_on_without_loss(suite):
    path = suite(overrides={"trainer.max_epochs": 12}, seeds=[0])
    first = Started(path)
    wait_for(lambda: len(Ledger(LEDGER).finished()) >= 1)
    wait_for(lambda: any(Path("runs").rglob("last.ckpt")) and list(Path(f"{LEDGER}.claims").glob("*.json")) != [])
    first.process.kill()
    first.end()
    before = len(Ledger(LEDGER).finished())
    assert before < 3
    code, out = Started(path).end()
    assert code == 0, out
    records = Ledger(LEDGER).read()
    assert len(records) == 3
    assert len({r["key"] for r in records}) == 3
    assert all(r["status"] == "finished" and r["steps"] == 300 for r in records)


def test_ctrl_c_stops_between_batches_and_is_no_failure(suite):
    path = suite(overrides={"trainer.max_epochs": 500}, seeds=[0], methods={"plain": {}})
    started = Started(path)
    wait_for(lambda: any(Path("runs").rglob("last.ckpt")))
    os.kill(started.process.pid, signal.SIGINT)
    code, out = started.end()
    assert code == 130, out
    assert Ledger(LEDGER).read() == []
    assert list(Path(f"{LEDGER}.claims").glob("*.json")) == []


def test_two_suites_at_once(suite):
    path = suite()
    codes, outs = zip(*(started.end() for started in [Started(path), Started(path)]), strict=True)
    assert codes == (0, 0), outs
    records = Ledger(LEDGER).read()
    assert len(records) == len({r["key"] for r in records}) == 6
    assert sum(int(out.rsplit(" runs finished", 1)[0].split()[-1]) for out in outs) == 6


def test_a_run_that_dies_takes_nothing_with_it(suite):
    methods = {"plain": {}, "dies": {"plugins": {"a": {"class_path": "dying.Dying"}}}, "mcc": METHODS["mcc"]}
    Path("dying.py").write_text(
        "import os, signal, uda\n\n\nclass Dying(uda.Plugin):\n    @uda.hookimpl\n"
        "    def align_features(self, step):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = suite(methods=methods, seeds=[0])
    code, out = Started(path, environment={"PYTHONPATH": os.getcwd()}).end()
    assert code == 1, out
    records = {r["method"]: r for r in Ledger(LEDGER).read()}
    assert records["dies"]["exit_code"] == -9
    assert records["plain"]["status"] == records["mcc"]["status"] == "finished"


def test_jobs_by_submitit(suite, capfd):
    """A job that runs in a process of its own, then one that fails in this one; both start a run anew."""
    pytest.importorskip("submitit")
    path = suite(seeds=[0], methods={"plain": {}, "broken": {"overrides": {"data.source": "sauce"}}})
    submit = ["bench", "run", path, "--executor", "submitit", "--cluster"]
    assert main([*submit, "local", "--only", "plain"]) == 0
    (plain,) = Ledger(LEDGER).read()
    assert (plain["method"], plain["status"]) == ("plain", "finished")
    assert main([*submit, "debug"]) == 1
    broken = Ledger(LEDGER).read()[1]
    assert (broken["method"], broken["status"]) == ("broken", "failed")
    assert "sauce" in broken["error"]
    assert main([*submit, "debug", "--only", "plain"]) == 0
    assert len(Ledger(LEDGER).read()) == 2


def test_tuning_with_real_runs(suite, capfd):
    pytest.importorskip("optuna")
    assert main(["bench", "tune", suite(), "--plugin", "refine", "--method", "mcc", "--trials", "3"]) == 0
    out = capfd.readouterr().out
    assert "best of 3 by transfer_score" in out
    assert "--model.plugins.refine.weight=" in out
