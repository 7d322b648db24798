"""Command-line arguments and config files of a run, checked name by name and put in the parser's form."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import yaml

from uda import spelling
from uda.bench.merge import merged
from uda.errors import UDAError, nearest
from uda.subclasses import subclasses_listed_once

COMMON = ("config", "seed_everything", "run_dir", "ckpt_path", "weights_only")
OPTIONS = {
    "fit": (*COMMON, "checkpoint_every", "select_by"),
    "validate": (*COMMON, "verbose"),
    "test": (*COMMON, "verbose"),
    "predict": (*COMMON, "return_predictions", "probabilities"),
    "inspect": ("config", "seed_everything"),
}


def option(argv: list[str], name: str) -> str | None:
    """Last value of ``--name`` on a command line."""
    value = None
    for i, word in enumerate(argv):
        if word.startswith(f"--{name}="):
            value = word.partition("=")[2]
        elif word == f"--{name}" and i + 1 < len(argv):
            value = argv[i + 1]
    return value


def instantiated(parser: Any, config: Any) -> Any:
    """A parsed config with all its classes made, by jsonargparse before and after 4.49, which renamed the method."""
    make = getattr(parser, "instantiate", None) or parser.instantiate_classes
    with subclasses_listed_once():
        return make(config)


class Arguments:
    """Turns ``argv`` into arguments for the parser.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``; others take configs as ``inspect`` does.
        sections: class behind each of ``model``, ``data`` and ``trainer``.
        folder: where the checked config files are put for the parser to read.
    """

    def __init__(self, command: str, sections: dict[str, type], folder: Path) -> None:
        self.command, self.sections, self.folder = command, sections, folder
        self.options = OPTIONS.get(command, OPTIONS["inspect"])
        self.configs: list[str] = []
        self._files: list[dict[str, Any]] = []  # what was checked, as the parser will read it
        self._overridden: set[tuple[str, str]] = set()  # settings that an option has changed so far
        self.merged: dict[str, Any] = {name: {} for name in sections}

    def prepare(self, argv: list[str]) -> list[str]:
        """Checked arguments, one word each.

        Raises:
            UDAError: a name that does not exist, with the nearest ones.
        """
        words, out = list(argv), []
        while words:
            word = words.pop(0)
            if not word.startswith("-"):
                hint = f"--config {word}" if word.endswith((".yaml", ".yml", ".json")) else f"--{word}=..."
                raise UDAError(f"uda {self.command} takes options, not {word!r}. Did you mean {hint}?")
            if word in ("-h", "--help") or word.startswith("--print_config"):
                out.append(word)
                continue
            name, equals, value = word.partition("=")
            if not equals and words and not words[0].startswith("--"):
                value, equals = words.pop(0), "="
            if name in ("-c", "--config"):
                out.append(f"--config={self._config(value)}")
            elif name.startswith("--") and (equals or name == "--help"):
                out.append(f"{name}={self._override(name[2:], value)}")
            else:
                self._override(name.lstrip("-"), "null")
                raise UDAError(f"{name} needs a value: {name}=...")
        return out

    # ------------------------------------------------------------------------------------------- files

    def _config(self, path: str) -> str:
        config = spelling.load_yaml(path)
        known = {*self.sections, *(o for options in OPTIONS.values() for o in options)}
        for key in list(config):
            if key not in known:
                raise UDAError(
                    f"{path}: unknown key {key!r}. {nearest(str(key), known)}{self._elsewhere(str(key))}"
                )
            if key not in self.sections and key not in self.options:
                del config[key]  # an option of another command
        for name, owner in self.sections.items():
            given = config.get(name)
            if given is None:
                config.pop(name, None)
                continue
            if not isinstance(given, dict):
                raise UDAError(f"{path}: {name} must be a mapping of settings, not {given!r}.")
            spelling.check_arguments(owner, given, f"{path}: {name}")
            for key, hint in spelling.parameters(owner)[0].items():
                if key in given and spelling._item(hint, dict) is not None and self.merged[name].get(key):
                    given[key] = merged(self.merged[name][key], given[key])
                    if (name, key) not in self._overridden:  # an override in between needs the class that it is for
                        self._forget(name, key)
            self.merged[name].update(given)
        self.configs.append(path)
        self._files.append(config)
        return str(self._write(len(self._files)))

    def _forget(self, section: str, key: str) -> None:
        """Take a setting out of the earlier files: a later one has it whole, and the parser must not join them again.

        It would drop entries that the later file does not have, and keep settings of a class that was replaced.
        """
        for number, config in enumerate(self._files, start=1):
            if isinstance(config.get(section), dict) and config[section].pop(key, None) is not None:
                self._write(number)

    def _write(self, number: int) -> Path:
        copy = self.folder / f"config{number}.yaml"
        copy.write_text(yaml.safe_dump(self._files[number - 1], sort_keys=False))
        return copy

    def _elsewhere(self, key: str) -> str:
        for name, owner in self.sections.items():
            if key in spelling.parameters(owner)[0]:
                return f" ({key} is a setting of {name}: {name}.{key}.)"
        return ""

    # --------------------------------------------------------------------------------------- overrides

    def _override(self, key: str, value: str) -> str:
        head, *rest = key.split(".")
        if head not in self.sections:
            known = [
                *self.options,
                *(f"{s}.{p}" for s in self.sections for p in spelling.parameters(self.sections[s])[0]),
            ]
            if head not in self.options:
                raise UDAError(f"--{key}: unknown option. {nearest(key, known)}{self._elsewhere(head)}")
            return value
        if not rest:
            return value
        self._overridden.add((head, rest[0]))
        return self._walk(self.sections[head], rest, self.merged[head], f"--{head}", value)

    def _walk(self, owner: type, parts: list[str], node: dict[str, Any], where: str, value: str) -> str:
        known, anything = spelling.parameters(owner)
        name = parts[0].removesuffix("+")
        if name not in known:
            if anything:
                return value
            raise UDAError(
                f"{where}.{name}: {owner.__name__} has no argument {name!r}. {nearest(name, known)}"
            )
        default = inspect.signature(owner).parameters[name].default
        if name not in node and isinstance(default, tuple(spelling.classes_of(known[name])) or ()):
            node[name] = {"class_path": spelling.path_of(type(default))}
        return self._walk_value(known[name], parts[1:], node, name, f"{where}.{name}", value)

    def _walk_value(
        self, hint: Any, rest: list[str], parent: dict[str, Any], name: str, where: str, value: str
    ) -> str:
        bases, node = spelling.classes_of(hint), parent.get(name)
        if not rest:
            return self._final(hint, parent, name, where, value)
        item = spelling._item(hint, dict)
        if item is not None and spelling.classes_of(item):
            entries = node if isinstance(node, dict) else {}
            if rest[0] not in entries and len(rest) > 1 and rest[1] != "class_path":
                raise UDAError(f"{where}: no entry {rest[0]!r}. {nearest(rest[0], entries)}")
            parent[name] = entries
            return self._walk_value(item, rest[1:], entries, rest[0], f"{where}.{rest[0]}", value)
        if not bases:
            return value
        if rest[0] == "class_path":
            return self._final(hint, parent, name, where, value)
        path = node.get("class_path") if isinstance(node, dict) else None
        cls = spelling.resolve(path, bases, where) if path else None
        inner = rest[1:] if rest[0] in ("init_args", "dict_kwargs") else rest
        if path is None:
            raise UDAError(
                f"{where}.{inner[0] if inner else rest[0]}: {where} has no class yet. "
                f"Name one first: {where}=..."
            )
        if cls is None or not inner or rest[0] == "dict_kwargs":
            return value
        return self._walk(cls, inner, node.setdefault("init_args", {}) or {}, where, value)

    def _final(self, hint: Any, parent: dict[str, Any], name: str, where: str, value: str) -> str:
        """The value itself: class names made full, nested values checked."""
        try:
            plain = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        if isinstance(plain, str) and (Path(plain).is_file() or plain.endswith((".yaml", ".yml", ".json"))):
            return value
        checked = spelling.check_value(hint, plain, where)
        if checked is plain:
            return value
        parent[name] = checked
        if isinstance(checked, dict) and set(checked) == {"class_path"} and isinstance(plain, str):
            return checked["class_path"]
        return json.dumps(checked)
