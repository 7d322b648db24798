"""The scaffold: names, files, and (slow) a new distribution that installs and whose tests pass."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import uda
from uda.discovery import registry
from uda.scaffold import names_of, new_plugin
from uda.testing import forks


def test_names():
    expected = {"dist": "uda-my-method", "package": "uda_my_method", "module": "my_method", "cls": "MyMethod"}
    assert names_of("uda-my-method") == expected
    assert names_of("wide-2d")["cls"] == "Wide2d"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("My Method", "'my-method'"),
        ("MyMethod", "'my-method'"),
        ("my_method", "'my-method'"),
        ("2fast", "letter first"),
        ("", "letter first"),
        ("../up", "'up'"),
        ("a--b", "'a-b'"),
        ("class", "word of the Python language"),
        ("uda-class", "word of the Python language"),
        ("uda-2", "letter must follow"),
        ("uda", "package 'uda' already"),
        ("torch", "package 'torch' already"),
        ("json", "package 'json' already"),
    ],
)
def test_bad_names_are_refused(name, message, tmp_path):
    with pytest.raises(uda.UDAError, match=message):
        new_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_files_are_complete(tmp_path):
    folder = new_plugin("uda-my-method", tmp_path / "deep" / "er")
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "README.md", "pyproject.toml", "src/uda_my_method/__init__.py", "src/uda_my_method/my_method.py",
        "tests/test_my_method.py", "uda-my-method.yaml",
    ]  # fmt: skip
    for name in files:
        text = (folder / name).read_text()
        assert not any(f"@{key}@" in text for key in ("dist", "package", "module", "cls")), name
        if name.endswith(".py"):
            compile(text, name, "exec")
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["uda.plugins"] == {"MyMethod": "uda_my_method.my_method:MyMethod"}
    config = yaml.safe_load((folder / "uda-my-method.yaml").read_text())
    assert config["model"]["plugins"]["align"]["class_path"] == "MyMethod"


def test_nothing_is_overwritten(tmp_path):
    folder = new_plugin("uda-my-method", tmp_path)
    marked = folder / "README.md"
    marked.write_text("mine")
    with pytest.raises(uda.UDAError, match="exists already"):
        new_plugin("uda-my-method", tmp_path)
    assert marked.read_text() == "mine"


def test_generated_code_is_clean(tmp_path):
    ruff = pytest.importorskip("ruff.__main__", reason="ruff is not installed")
    folder = new_plugin("uda-my-method", tmp_path)
    config = Path(__file__).parent.parent / "pyproject.toml"
    command = [ruff.find_ruff_bin(), "check", "--config", str(config), "--ignore", "D1,I001", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def install(folder: Path, target: Path) -> dict[str, str]:
    """Install a distribution beside the environment; gives the variables that make it visible."""
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
    done = subprocess.run([*pip, "--target", str(target), str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**forks.clean_environment(), "PYTHONPATH": path}


def print_distribution(plugin: str) -> None:
    print(registry().plugins[plugin].distribution)


@pytest.mark.slow
def test_new_distribution_installs_and_passes_its_tests(tmp_path):
    folder = new_plugin("uda-my-method", tmp_path)
    env = install(folder, tmp_path / "site")
    done = forks.run(print_distribution, "MyMethod", folder=tmp_path, environment=env)
    assert done.stdout.strip() == "uda-my-method", done.stderr
    done = forks.run(forks.own_tests, "tests", folder=folder, environment=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 passed" in done.stdout
