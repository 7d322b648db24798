"""The documentation of the hooks is complete, and each hook has a test."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from uda.hooks import HOOKS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "hooks.md").read_text()
TESTS = "\n".join(
    p.read_text()
    for d in ("tests", "plugins")
    for p in sorted((ROOT / d).rglob("test_*.py"))
    if p.name != "test_docs.py"
)


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_stands_in_the_docs_with_its_arguments(hook):
    arguments = ", ".join(HOOKS[hook])
    assert re.search(rf"^### {hook}$", PAGE, re.M), f"docs/hooks.md has no section on {hook}"
    row = re.search(rf"^\|[^|]*\| \[`{hook}`\]\(#{hook}\) \| `([^`]*)` \|", PAGE, re.M)
    assert row, f"the table of docs/hooks.md has no row on {hook}"
    assert row[1] == arguments, f"docs/hooks.md gives {hook}({row[1]}), the contract is {hook}({arguments})"
    assert f"`{hook}({arguments})`" in PAGE, f"the section on {hook} does not show {hook}({arguments})"


def test_docs_name_no_hook_that_does_not_exist():
    assert set(re.findall(r"^### (\w+)$", PAGE, re.M)) == set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_hook_is_exercised_by_a_test(hook):
    marked = rf"@(?:uda\.)?hookimpl\s+def {hook}\("
    assert re.search(marked, TESTS), f"no test fills the hook {hook}"


PAGES = sorted(p for d in ("docs", "plugins", "configs") for p in (ROOT / d).rglob("*.md"))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"])
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}, which is not there"


def test_rooms_stay_small():
    limits = {"uda/hookspecs.py": 300, "uda/module.py": 300, "uda/cli.py": 110}
    for name, limit in limits.items():
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= limit, f"{name} has {lines} lines: split it"
    for path in (ROOT / "plugins").glob("*/src/**/*.py"):
        assert len(path.read_text().splitlines()) <= 250, f"{path.relative_to(ROOT)} is too long for one method"
