"""The core without any plugin, in an environment of its own.

Run it where ``uda-lightning``, pytest and setuptools are installed and no plugin distribution is::

    python -m venv core
    core/bin/pip install . pytest setuptools
    core/bin/python -m pytest tests/isolated

Elsewhere it skips.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from uda.testing import forks

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "docs" / "examples" / "uda-sample-plugin"

installed = sorted({e.dist.name for e in metadata.entry_points(group="uda.plugins")} - {"uda-lightning"})
pytestmark = pytest.mark.skipif(
    bool(installed), reason=f"plugin distributions are installed: {', '.join(installed)}"
)

TINY = [
    "--model.backbone=small_cnn", "--model.bottleneck=16", "--data.reader=Digits",
    "--data.reader.init_args.n_rendered=400", "--data.source=rendered", "--data.target=handwritten",
    "--data.batch_size=32", "--data.epoch_steps=5", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
]  # fmt: skip


def environment(path: Path | None) -> dict[str, str]:
    env = forks.clean_environment()
    if path is not None:
        env["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def python(*arguments: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """An interpreter started anew."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(path), capture_output=True, text=True)


def uda_command(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """``uda WORDS`` in a fork, which has the imports already."""
    return forks.run(forks.command, list(words), folder=cwd, environment=environment(path))


def test_nothing_is_installed(tmp_path):
    done = uda_command("plugins", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No plugin distribution is installed" in done.stdout


def test_source_only_training_learns(tmp_path):
    import lightning as L
    import torch

    import uda
    from uda.data import Generated

    torch.manual_seed(0)
    model = uda.UDA("mlp", bottleneck=16)
    data = uda.DataModule(
        Generated(), source="source", target="target", batch_size=32, epoch_steps=20, seed=0
    )
    trainer = L.Trainer(
        max_epochs=5, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, data)
    assert model.data_needs == uda.DataNeeds.union([])
    assert trainer.callback_metrics["source_accuracy"] > 0.8
    assert not [name for name in sys.modules if name.startswith("uda_")]


def test_command_line_trains_source_only(tmp_path):
    done = uda_command("fit", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_unknown_plugin_says_that_none_is_installed(tmp_path):
    done = uda_command("fit", *TINY, "--model.plugins.align=DANN", cwd=tmp_path)
    assert done.returncode == 2
    assert "DANN" in done.stderr
    assert "Traceback" not in done.stderr


def fingerprint() -> str:
    """Hash of every source file of the package."""
    import uda

    digest = hashlib.sha256()
    for path in sorted(Path(uda.__file__).parent.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            digest.update(str(path).encode() + path.read_bytes())
    return digest.hexdigest()


def test_a_plugin_installs_and_trains_without_an_edit(tmp_path):
    before = fingerprint()
    ignore = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(SAMPLE, tmp_path / "source", ignore=ignore)
    pip = ("-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    done = python(*pip, "--target", str(tmp_path / "site"), str(source), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    listed = uda_command("plugins", cwd=tmp_path, path=tmp_path / "site")
    assert "CentroidLabels" in listed.stdout
    plugin = ["--model.plugins.labels=CentroidLabels", "--model.plugins.labels.weight=0.5"]
    done = python("-m", "uda.cli", "fit", *TINY, *plugin, cwd=tmp_path, path=tmp_path / "site")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert fingerprint() == before
