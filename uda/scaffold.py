"""Write a new plugin distribution: installable, with a method that works and tests that check it."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib import resources
from pathlib import Path

from uda.errors import UDAError

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
#: File of the template -> path in the new distribution.
_FILES = {
    "pyproject.toml.template": "pyproject.toml",
    "README.md.template": "README.md",
    "config.yaml.template": "{dist}.yaml",
    "init.py.template": "src/{package}/__init__.py",
    "method.py.template": "src/{package}/{module}.py",
    "test_method.py.template": "tests/test_{module}.py",
}


def names_of(name: str) -> dict[str, str]:
    """What a distribution called ``name`` calls its package, module and class.

    ``uda-my-method`` and ``my-method`` both hold the module ``my_method`` and the class ``MyMethod``.

    Raises:
        UDAError: a name that cannot be a distribution's, or that would hide another package.
    """
    if not _NAME.fullmatch(name):
        near = re.sub(r"[^a-z0-9]+", "-", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()).strip("-")
        hint = f" For example {near!r}." if _NAME.fullmatch(near) else ""
        raise UDAError(
            f"{name!r} cannot name a plugin distribution: use lower-case letters, digits and single "
            "hyphens, with "
            f"a letter first.{hint}"
        )
    package = name.replace("-", "_")
    short = name.removeprefix("uda-")
    if not _NAME.fullmatch(short):
        raise UDAError(f"{name!r} cannot name a plugin distribution: a letter must follow 'uda-'.")
    module = short.replace("-", "_")
    if keyword.iskeyword(package) or keyword.iskeyword(module):
        raise UDAError(
            f"{name!r} is a word of the Python language: take another name, such as '{name}-method'."
        )
    if package == "uda" or importlib.util.find_spec(package) is not None:
        raise UDAError(
            f"There is a package {package!r} already, which a distribution {name!r} would hide: take another "
            f"name, such as {name + '-method' if name.startswith('uda') else 'uda-' + name!r}."
        )
    cls = "".join(part.capitalize() for part in short.split("-"))
    return {"dist": name, "package": package, "module": module, "cls": cls}


def new_plugin(name: str, directory: str | Path = ".") -> Path:
    """Write a plugin distribution called ``name`` into ``directory``.

    It holds a ``pyproject.toml`` with the entry point, one module with a small method, a test that runs
    :func:`uda.testing.check_plugin`, a config and a README.

    Args:
        name: of the distribution, such as ``uda-my-method``.
        directory: where its folder is made; created where it is missing.

    Returns:
        The new folder.

    Raises:
        UDAError: for a bad name, or where the folder exists already; nothing is ever overwritten.
    """
    names = names_of(name)
    from uda.discovery import registry

    if names["cls"] in registry().plugins or names["cls"] in registry().clashes:
        raise UDAError(
            f"An installed distribution offers a plugin {names['cls']!r} already: two of one name could "
            "only be used "
            "by their full class path. Take another name."
        )
    folder = Path(directory).expanduser() / name
    if folder.exists():
        raise UDAError(
            f"{str(folder)!r} exists already and is not overwritten: choose another name or place."
        )
    template = resources.files("uda") / "template"
    texts = {
        target.format(**names): _filled((template / source).read_text(encoding="utf-8"), names)
        for source, target in _FILES.items()
    }  # all of it is read before the first file is written
    for relative, text in texts.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    return folder


def _filled(text: str, names: dict[str, str]) -> str:
    for key, value in names.items():
        text = text.replace(f"@{key}@", value)
    return text
