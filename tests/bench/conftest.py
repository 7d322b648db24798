"""A small suite, and a launcher that writes summaries instead of training."""

from __future__ import annotations

import json
import threading
import zlib
from pathlib import Path

import pytest
import yaml

from uda.bench.launch import Outcome, last_lines, prepare
from uda.bench.suite import Run, Suite

SUITE = {
    "name": "toy",
    "base": "base.yaml",
    "seeds": [0, 1],
    "tasks": {
        "a->b": {"data.source": "a", "data.target": "b"},
        "b->a": {"data.source": "b", "data.target": "a"},
    },
    "methods": {
        "plain": {},
        "dann": {"plugins": {"align": {"class_path": "DANN", "init_args": {"weight": 1.0}}}},
    },
}
BASE = {
    "model": {"backbone": "identity"},
    "data": {"reader": {"class_path": "Generated"}},
    "trainer": {"max_epochs": 1},
}


def summary(run: Run, last: float, score: float = 1.0, oracle: float | None = None) -> dict:
    """A summary as a run writes it."""
    accuracy = {"last": last, "selected": last, "oracle": last if oracle is None else oracle}
    return {
        "source_accuracy": 0.9, "target_accuracy": accuracy, "target_class_accuracy": accuracy,
        "selection": {"score": run.select_by, "epoch": 0, "step": 1, "value": score},
        "scores": {"im": {"last": score, "target_accuracy": last}},
        "seconds": 1.0, "steps": 1, "epochs": 1, "peak_memory_mib": 10.0, "device": "cpu", "world_size": 1,
        "versions": {}, "config_hash": "0",
    }  # fmt: skip


class FakeLaunch:
    """Writes what a run would; counts; fails where it is told to."""

    def __init__(self, fail: tuple[str, ...] = (), hold: threading.Event | None = None) -> None:
        self.fail, self.hold = fail, hold
        self.done: list[str] = []
        self.configs: dict[str, dict] = {}

    def __call__(self, run: Run, clean: bool, environment: dict[str, str]) -> Outcome:
        _argv, log, used = prepare(run, clean)
        self.done.append(run.label)
        if self.hold is not None:
            assert self.hold.wait(20)
        config, _ = run.expanded()
        self.configs[run.label] = config
        if any(part in run.label for part in self.fail):
            log.write_text("step 1\nRuntimeError: out of luck\n")
            return Outcome(1, 0.5, last_lines(log), used)
        (run.folder / "checkpoints").mkdir(parents=True)
        if config["trainer"].get("enable_checkpointing", True):
            (run.folder / "checkpoints" / "last.ckpt").write_text(run.label)
        accuracy = 0.5 + zlib.crc32(run.label.encode()) % 100 / 1000
        (run.folder / "summary.json").write_text(json.dumps(summary(run, accuracy)))
        (run.folder / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": run.seed}))
        return Outcome(0, 0.5, "", used)


@pytest.fixture
def fake():
    return FakeLaunch()


@pytest.fixture
def write_suite(tmp_path):
    """Writes a suite file (with changes) beside its base config, and loads it."""

    def write(**changes) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "toy.yaml"
        spec = {**SUITE, "runs_dir": str(tmp_path / "runs"), **changes}
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path

    return write


@pytest.fixture
def load(write_suite):
    return lambda **changes: Suite.load(write_suite(**changes))


@pytest.fixture
def launcher():
    """The class, to be made with arguments."""
    return FakeLaunch
