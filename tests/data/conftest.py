from __future__ import annotations

import os
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from uda.plugin import DataNeeds


class Recorder(L.LightningModule):
    """Trains one number and writes down what it was given."""

    def __init__(self, needs=None, stop_after: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.data_needs = needs or DataNeeds()
        self.seen: list[dict] = []
        self.stop_after = stop_after
        self.evaluated: dict[int, list] = {}

    def training_step(self, batch, batch_idx):
        if self.stop_after is not None and len(self.seen) == self.stop_after:
            raise KeyError("killed")
        flat = {f"sources/{k}": v for k, v in batch.get("sources", {}).items()}
        flat |= {k: batch[k] for k in ("target", "held_out") if k in batch}
        self.seen.append({k: {n: t.clone() for n, t in b.items()} for k, b in flat.items()})
        return (self.weight - 1).square().sum()

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluated.setdefault(dataloader_idx, []).append(batch)

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def same_batches(a: list[dict], b: list[dict]) -> bool:
    """Whether two records of batches are equal, bit for bit."""
    if len(a) != len(b):
        return False
    for left, right in zip(a, b, strict=True):
        if left.keys() != right.keys():
            return False
        for key in left:
            if left[key].keys() != right[key].keys():
                return False
            if not all(torch.equal(left[key][n], right[key][n]) for n in left[key]):
                return False
    return True


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def same():
    return same_batches


@pytest.fixture
def trainer(tmp_path):
    def make(**kwargs):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(**{**defaults, **kwargs})

    return make


def write_image(path, seed: int, size: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def make_image():
    return write_image


@pytest.fixture
def folders(tmp_path):
    """Two domains of three classes: root/{photo,sketch}/{cat,dog,fox}/*.png, 4 to 6 images a class."""
    root = tmp_path / "images"
    seed = 0
    for domain, sizes in (("photo", (6, 5, 4)), ("sketch", (4, 5, 6))):
        for name, n in zip(("cat", "dog", "fox"), sizes, strict=True):
            for i in range(n):
                write_image(root / domain / name / f"{i}.png", seed := seed + 1)
    return root


@pytest.fixture
def npz(tmp_path):
    """Two domains of small colour images and one unlabelled, in one .npz."""
    rng = np.random.default_rng(0)
    path = tmp_path / "arrays.npz"
    arrays = {}
    for name, n in (("a", 40), ("b", 30), ("c", 20)):
        arrays[f"{name}_x"] = rng.integers(0, 255, (n, 8, 8, 3), dtype=np.uint8)
        if name != "c":
            arrays[f"{name}_y"] = np.arange(n) % 4
    np.savez(path, **arrays)
    return path


@pytest.fixture
def shared():
    """Folder of real data that some tests use where it is there."""
    default = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("UDA_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no real data here: set UDA_SHARED_DATA")
    return folder
