"""The sample distribution: the page shows its code, and (slow) it installs, trains and passes its tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from uda.hooks import HOOKS
from uda.testing import CHECKS, forks

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "docs" / "examples" / "uda-sample-plugin"
PAGE = ROOT / "docs" / "write_a_plugin.md"
BLOCK = re.compile(r"<!-- from: (?P<file>\S+) -->\n```\w+\n(?P<code>.*?)\n```", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return [(m["file"], m["code"]) for m in BLOCK.finditer(PAGE.read_text())]


def test_page_has_code():
    text = PAGE.read_text()
    assert len(blocks()) == text.count("```") // 2  # no block of code without a source
    assert {file for file, _ in blocks()} >= {"src/uda_sample/centroids.py", "pyproject.toml"}


@pytest.mark.parametrize(("file", "code"), blocks(), ids=lambda v: v.splitlines()[0][:40])
def test_code_on_the_page_is_that_of_the_files(file, code):
    place = ROOT if file.startswith("plugins/") else SAMPLE
    assert code in (place / file).read_text()


def test_page_names_every_hook_and_check():
    text = PAGE.read_text()
    assert [h for h in HOOKS if f"`{h}`" not in text] == []
    assert [c for c in CHECKS if f"| `{c}` |" not in text] == []


def test_sample_names_are_no_part_of_the_package():
    """The package knows nothing of the sample: installing it needs no edit."""
    for path in (ROOT / "uda").rglob("*.py"):
        assert "CentroidLabels" not in path.read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The sample installed beside the environment: its folder and the variables that make it visible."""
    place = tmp_path_factory.mktemp("sample")
    source = shutil.copytree(
        SAMPLE, place / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    done = subprocess.run(
        [*pip, "--target", str(place / "site"), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    return source, {**forks.clean_environment(), "PYTHONPATH": path}


def run(function, argument, installed) -> str:
    """A function in a fork that finds the sample."""
    source, env = installed
    done = forks.run(function, argument, folder=source, environment=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_its_own_tests_pass(installed):
    assert "7 passed" in run(forks.own_tests, "tests", installed)


@pytest.mark.slow
def test_its_config_trains_by_name(installed, tmp_path):
    sizes = ["--trainer.max_epochs=1", "--data.epoch_steps=2", "--data.reader.init_args.n_rendered=300"]
    quiet = [f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    run(forks.command, ["fit", "--config", "digits_centroids.yaml", *sizes, *quiet], installed)


@pytest.mark.slow
def test_it_is_listed(installed):
    assert "CentroidLabels" in run(forks.command, ["plugins"], installed)
