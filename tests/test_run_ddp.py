"""``uda fit`` and ``uda predict`` on two processes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from uda.testing import forks

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


def at(folder: Path, words: list[str]) -> None:
    """``uda WORDS`` there, as one of two processes; leaves its exit code."""
    os.chdir(folder)
    try:
        forks.command(words)
    except SystemExit as end:
        (folder / f"code{os.environ['LOCAL_RANK']}").write_text(str(end.code))
        raise


@pytest.mark.slow
def test_two_processes_share_a_run_directory_and_write_all_predictions(tmp_path: Path) -> None:
    """The fit is started by hand, and Lightning starts its second process; the prediction's are there already."""
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "uda.cli", "fit", "--config", "two.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "runs" / "two").iterdir()] == ["seed0"]
    made = tmp_path / "runs" / "two" / "seed0"
    summary = json.loads((made / "summary.json").read_text())
    assert (summary["world_size"], summary["steps"]) == (2, 8)
    assert done.stdout.count("target, selected") == 1
    words = ["predict", "--ckpt_path", str(made / "checkpoints" / "selected.ckpt")]
    wrong, outputs = forks.run_ranks(at, tmp_path, words, folder=tmp_path)
    assert not wrong, outputs
    with (made / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(r["index"]) for r in rows] == list(range(65))
    assert [p.name for p in (tmp_path / "runs" / "two").iterdir()] == ["seed0"]


@pytest.mark.slow
def test_an_error_on_two_processes_ends_both(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(CONFIG))
    words = ["fit", "--config", "two.yaml", "--data.batch_size=64"]
    wrong, outputs = forks.run_ranks(at, tmp_path, words, folder=tmp_path)
    assert re.fullmatch(r"process \d failed", wrong)
    assert [(tmp_path / f"code{rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    for output in outputs:
        assert "data.batch_size" in output
        assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()
