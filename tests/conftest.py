"""Shared pieces of the tests: small data, small models, quiet trainers."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: processes of a test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
logging.getLogger("lightning.fabric").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems():  # where tests run: the process that hands them out needs no torch
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data outside the repository; tests that need it skip where it is absent."""
    path = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("real data is absent: set UDA_SHARED_DATA to its folder")
    return path


@pytest.fixture
def small_data():
    """A generated two-domain task of features, ready for a trainer."""
    from uda.data import DataModule, Generated

    def make(**options):
        options = {"batch_size": 16, "epoch_steps": 4, "seed": 0, **options}
        return DataModule(Generated(), source="source", target="target", **options)

    return make


@pytest.fixture
def quiet_trainer(tmp_path):
    """A trainer without logs, bars and checkpoints."""
    import lightning as L

    def make(**options):
        defaults = {
            "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
        }  # fmt: skip
        return L.Trainer(**{**defaults, **options})

    return make
