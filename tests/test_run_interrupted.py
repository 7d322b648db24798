"""Runs that are killed, requeued or stopped end with the weights of an undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from uda.testing import forks

CALLBACK = '''
import os, signal
import lightning as L


class SignalInStep(L.Callback):
    """Sends this process a signal between forward and backward of a step, in its first start only."""

    def __init__(self, step: int, name: str) -> None:
        self.step, self.name = step, name

    def on_before_backward(self, trainer, pl_module, loss):
        marker = os.path.join(trainer.default_root_dir, "sent")
        if trainer.global_step == self.step and not os.path.exists(marker):
            open(marker, "w").close()
            os.kill(os.getpid(), getattr(signal, self.name))
'''
CONFIG = {
    "seed_everything": 3,
    "model": {
        "backbone": "small_cnn",
        "bottleneck": 16,
        "bottleneck_dropout": 0.3,
        "plugins": {
            "align": {"class_path": "DANN", "init_args": {"hidden": 8, "dropout": 0.2}},
            "refine": {"class_path": "MCC"},
        },
    },
    "data": {
        "reader": {"class_path": "Digits", "init_args": {"n_rendered": 300}},
        "source": "rendered",
        "target": "handwritten",
        "batch_size": 16,
        "epoch_steps": 8,
    },
    "trainer": {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 2},
}


def run(folder: Path, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """``uda fit WORDS`` in a fork, which has the imports already."""
    env = {**forks.clean_environment(), "PYTHONPATH": str(folder), **(environment or {})}
    return forks.run(forks.command, ["fit", *words], folder=folder, environment=env)


def with_signal(step: int, name: str) -> list[str]:
    callback = {"class_path": "sender.SignalInStep", "init_args": {"step": step, "name": name}}
    return [f"--trainer.callbacks={json.dumps([callback])}"]


def assert_same_end(one: Path, two: Path) -> None:
    """Weights, optimiser state and history of the two runs' last checkpoints."""
    a, b = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (one, two))
    assert a["global_step"] == b["global_step"] == 24
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, b["state_dict"][name]), name
    for key, state in a["optimizer_states"][0]["state"].items():
        assert torch.equal(
            state["momentum_buffer"], b["optimizer_states"][0]["state"][key]["momentum_buffer"]
        )
    histories = [c["callbacks"]["RunSummary"]["history"] for c in (a, b)]
    assert histories[0] == histories[1]
    assert [h["step"] for h in histories[0]] == [8, 16, 24]
    metrics = [(p / "logs" / "metrics.csv").read_text() for p in (one, two)]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "digits.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "sender.py").write_text(CALLBACK)
    # a process started anew, from a shell as it were, is what the forks have to equal
    command = [sys.executable, "-m", "uda.cli", "fit", "--config", "digits.yaml", "--run_dir", "run"]
    env = {**forks.clean_environment(), "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def folder(undisturbed: Path, tmp_path: Path) -> Path:
    for name in ("digits.yaml", "sender.py"):
        (tmp_path / name).write_text((undisturbed / name).read_text())
    return tmp_path


@pytest.mark.slow
def test_a_killed_run_resumes_from_a_checkpoint_within_an_epoch(undisturbed: Path, folder: Path) -> None:
    words = (
        "--config",
        "digits.yaml",
        "--run_dir",
        "run",
        "--checkpoint_every",
        "3",
        *with_signal(14, "SIGKILL"),
    )
    assert run(folder, *words).returncode == -signal.SIGKILL
    saved = torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 12
    done = run(folder, *words, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stdout
    assert_same_end(undisturbed / "run", folder / "run")


@pytest.mark.slow
def test_a_slurm_requeue_resumes_to_the_same_weights(undisturbed: Path, folder: Path) -> None:
    binaries = folder / "bin"
    binaries.mkdir()
    scontrol = binaries / "scontrol"
    # as the real one does, the fake one brings the job down
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/scontrol.log\nkill -9 $PPID\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IEXEC)
    slurm = {
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost",
        "PATH": f"{binaries}:{os.environ['PATH']}",
    }  # fmt: skip
    words = ("--config", "digits.yaml", *with_signal(12, "SIGUSR1"))
    assert run(folder, *words, environment=slurm).returncode == -signal.SIGKILL
    assert (folder / "scontrol.log").read_text().split() == ["requeue", "4711"]
    made = folder / "runs" / "digits" / "seed3"
    saved = torch.load(made / "hpc_ckpt_1.ckpt", weights_only=True)
    assert saved["global_step"] == 13  # the batch in which the signal came was finished first
    done = run(folder, *words, environment={**slurm, "SLURM_RESTART_COUNT": "1"})
    assert done.returncode == 0, done.stderr
    assert [p.name for p in made.parent.iterdir()] == ["seed3"]  # no second directory
    assert_same_end(undisturbed / "run", made)
    record = json.loads((made / "run.json").read_text())
    assert [s["resumed"] is not None for s in record["starts"]] == [False, True]


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(undisturbed: Path, folder: Path) -> None:
    words = ("--config", "digits.yaml", "--run_dir", "run", *with_signal(10, "SIGINT"))
    stopped = run(folder, *words)
    assert stopped.returncode == 130
    assert "--ckpt_path last" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 11
    done = run(folder, *words, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr
    assert_same_end(undisturbed / "run", folder / "run")


@pytest.mark.slow
def test_sigterm_ends_with_its_own_exit_code(folder: Path) -> None:
    done = run(folder, "--config", "digits.yaml", "--run_dir", "run", *with_signal(10, "SIGTERM"))
    assert done.returncode == 143
    assert not (folder / "run" / "summary.json").exists()
