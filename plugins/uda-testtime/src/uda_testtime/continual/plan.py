"""What a sequence consists of: the config of each fit, and which folder it writes into."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from uda.bench.merge import merged, with_overrides
from uda.errors import UDAError
from uda.spelling import load_yaml


def composed(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Configs and overrides of a command line as one mapping, later ones over earlier ones; and the config files.

    Raises:
        UDAError: a word that is no option, an option without a value, or no config.
    """
    config: dict[str, Any] = {}
    files, words = [], list(words)
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("-"):
            raise UDAError(f"uda continual takes options, not {name!r}. Did you mean --config {name}?")
        if not equals:
            if not words:
                raise UDAError(f"{name} needs a value: {name}=...")
            value = words.pop(0)
        if name in ("-c", "--config"):
            files.append(value)
            config = merged(config, load_yaml(value))
        else:
            config = with_overrides(config, {name.lstrip("-"): yaml.safe_load(value)})
    if not files:
        raise UDAError("uda continual needs a config: --config FILE")
    return config, files


def without_plugins(config: dict[str, Any]) -> dict[str, Any]:
    """The same without any method."""
    return {**config, "model": {**config.get("model", {}), "plugins": {}}}


def with_files(config: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """The config with arguments set in each plugin whose constructor has them.

    Raises:
        UDAError: no plugin takes any.
    """
    from uda.discovery import registry

    out, taken = copy.deepcopy(config), False
    plugins = out["model"].get("plugins") or {}
    for key, given in plugins.items():
        entry = {"class_path": given} if isinstance(given, str) else given
        known = inspect.signature(registry().get(entry["class_path"])).parameters
        if own := {k: v for k, v in files.items() if k in known}:
            entry["init_args"], taken = {**(entry.get("init_args") or {}), **own}, True
            plugins[key] = entry
    if not taken:
        raise UDAError(
            f"--generalise: no plugin of it takes {' or '.join(files)}: it has {', '.join(plugins) or 'none'}. "
            "Use configs/methods/codag.yaml, or a plugin with such an argument."
        )
    return out


@dataclass(frozen=True)
class Plan:
    """A sequence of fits.

    Attributes:
        config: with the methods that adapt; shifts: domains in order.
        general: config of the fit that generalises, after each adaptation; None: the adapted model is handed on.
        memory: exemplars of all earlier domains together, for ``general``; out: the folder.
    """

    config: dict[str, Any]
    shifts: list[str]
    general: dict[str, Any] | None
    memory: int
    out: Path

    @classmethod
    def make(cls, words: list[str], shifts: list[str], generalise: str | None, memory: int, out: Path | None) -> Plan:
        """Of a command line.

        Raises:
            UDAError: a domain twice, no method, or wrong words.
        """
        config, files = composed(words)
        if twice := next((n for i, n in enumerate(shifts) if n in shifts[:i]), None):
            raise UDAError(f"--shifts: {twice!r} comes twice. Name each domain once.")
        sources = config.get("data", {}).get("source") or []
        if both := set(shifts) & set([sources] if isinstance(sources, str) else sources):
            raise UDAError(f"--shifts: {sorted(both)[0]!r} is a source (data.source) as well.")
        if "source" in shifts:
            raise UDAError("--shifts: 'source' is what the figures call the source; that domain needs another name.")
        if memory < 1:
            raise UDAError(f"--memory {memory}: it must be 1 or more.")
        general = None
        if generalise is not None:
            general = merged(without_plugins(config), load_yaml(generalise))
            with_files(general, {"labels": ""})
            if not config.get("model", {}).get("plugins"):
                raise UDAError("--generalise needs a method that adapts: --config configs/methods/shot.yaml")
        seed = config.get("seed_everything", 0)
        stems = "_".join(Path(f).stem for f in [*files, *([generalise] if generalise else [])])
        return cls(config, list(shifts), general, memory, out or Path("runs", f"continual_{stems}", f"seed{seed}"))

    def told(self) -> dict[str, Any]:
        """All that decides the results, as plain data."""
        told = {"shifts": self.shifts, "config": self.config, "general": self.general, "memory": self.memory}
        return json.loads(json.dumps(told, default=str))

    def folder(self, stage: int) -> Path:
        """Of a stage: 0 is the source."""
        return self.out / (f"{stage}-{self.shifts[stage - 1]}" if stage else "0-source")

    def fit(self, config: dict[str, Any], target: str, start: str | None) -> dict[str, Any]:
        """The config of one fit: its target, and the checkpoint that its weights come from."""
        data, model = dict(config.get("data", {})), dict(config.get("model", {}))
        data["target"] = target
        if start is not None:
            model["init_from"] = start
        return {**config, "data": data, "model": model}

    def source_fit(self) -> dict[str, Any]:
        """Of the stage of the source: no method, or the one that generalises."""
        config = without_plugins(self.config) if self.general is None else self.general
        return self.fit(config, self.shifts[0], None)
