"""``uda fit`` and ``uda predict`` on two processes that Lightning starts itself."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

CONFIG = {
    "model": {
        "backbone": "mlp",
        "bottleneck": 8,
        "plugins": {"align": {"class_path": "DANN", "init_args": {"hidden": 8}}},
    },
    "data": {
        "reader": {"class_path": "Generated", "init_args": {"n": 65}},
        "source": "source",
        "target": "target",
        "batch_size": 8,
        "epoch_steps": 4,
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 2, "strategy": "ddp"},
}


def run(folder: Path, *words: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "uda.cli", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_processes_share_a_run_directory_and_write_all_predictions(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    done = run(tmp_path, "fit", "--config", "two.yaml")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "runs" / "two").iterdir()] == ["seed0"]
    made = tmp_path / "runs" / "two" / "seed0"
    summary = json.loads((made / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 8)
    assert done.stdout.count("target, selected") == 1
    done = run(tmp_path, "predict", "--ckpt_path", str(made / "checkpoints" / "selected.ckpt"))
    assert done.returncode == 0, done.stderr
    with (made / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["index"]) for r in rows] == list(range(65))
    assert [p.name for p in (tmp_path / "runs" / "two").iterdir()] == ["seed0"]


@pytest.mark.slow
def test_an_error_on_two_processes_ends_both(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    done = run(tmp_path, "fit", "--config", "two.yaml", "--data.batch_size=64")
    assert done.returncode == 2
    assert "data.batch_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
