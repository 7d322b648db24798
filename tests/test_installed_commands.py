"""Commands that distributions bring: listed without an import, called with their words, refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from uda import cli
from uda.commands.installed import docstring, installed

GREET = '''"""``uda greet``: say hello, and nothing else.

More text.
"""


def main(argv):
    print("hello", *argv)
    return 3
'''


def distribute(folder: Path, name: str, entries: str, modules: dict[str, str]) -> None:
    """Put an installed distribution into a folder of the path."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[uda.commands]\n{entries}\n")
    for path, text in modules.items():
        file = folder / path
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)


@pytest.fixture
def greeting(tmp_path, monkeypatch):
    package = {"greeting/__init__.py": "raise RuntimeError('imported')", "greeting/greet.py": GREET}
    modules = {**package, "greet_top.py": GREET}
    distribute(tmp_path, "uda-greeting", "greet = greet_top:main\nheavy = greeting.greet:main", modules)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_command_is_called_with_its_name_and_words(greeting, capsys):
    assert cli.main(["greet", "there", "--x=1"]) == 3
    assert capsys.readouterr().out == "hello greet there --x=1\n"


def test_help_lists_it_without_importing_its_package(greeting, capsys):
    assert cli.main(["--help"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "[uda-greeting]" in line]
    assert rows == [[name, "say hello, and nothing else [uda-greeting]"] for name in ("greet", "heavy")]
    assert "greeting" not in sys.modules
    assert docstring("no_such_package.module") == "" == docstring("greeting.absent")


def test_built_in_names_are_not_taken_over(tmp_path, monkeypatch):
    distribute(tmp_path, "uda-thief", "fit = greet_top:main", {"greet_top.py": GREET})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "fit" not in installed(cli.COMMANDS)


def test_what_cannot_run_is_told_by_name(greeting, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    distribute(other, "uda-other", "greet = other_greet:main\nbroken = no_such_module:main\nword = sys:version", {})
    monkeypatch.syspath_prepend(str(other))
    for words, told in [
        (["greet"], ["uda-greeting", "uda-other", "Uninstall"]),
        (["broken"], ["'broken'", "uda-other", "no_such_module"]),
        (["word"], ["'word'", "sys:version"]),
        (["gret"], ["unknown command", "'greet'"]),
        (["ftt"], ["unknown command", "'fit'"]),
    ]:
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert all(t in error for t in told), error


def test_a_command_of_the_core_looks_at_no_distribution(tmp_path):
    code = (
        "from importlib import metadata; metadata.entry_points = None\n"
        "from uda import cli\ntry: cli.main(['report', '--help'])\nexcept SystemExit as stop: assert not stop.code"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
