"""What stands in a suite file: reading it, and refusing what it cannot mean."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from uda.bench.merge import merged
from uda.errors import UDAError, nearest

_METHOD_KEYS = ("config", "plugins", "overrides", "source", "init_from", "checkpoint")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UDAError: no such file, no YAML, or no mapping.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UDAError(f"no file {str(path)!r}. {nearest(path.name, near)}")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UDAError(f"{path} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise UDAError(f"{path} must hold a mapping of settings.")
    return data


def whole(value: Any, where: str) -> int:
    """A whole number, 0 or more; else a :class:`~uda.errors.UDAError`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UDAError(f"{where}: a whole number is needed, not {value!r}.")
    return value


def seed_list(seeds: Any, path: Path) -> list[int]:
    """A list of whole numbers; else a :class:`~uda.errors.UDAError`."""
    if not isinstance(seeds, list | tuple):
        raise UDAError(f"{path}: seeds is a list of whole numbers such as [0, 1, 2], not {seeds!r}.")
    return [whole(seed, f"{path}: seeds") for seed in seeds]


def check_keys(spec: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise a :class:`~uda.errors.UDAError` on a key that is none of ``known``."""
    for key in spec:
        if key not in known:
            raise UDAError(f"{where}: unknown key {key!r}. {nearest(str(key), known)}")


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping; else a :class:`~uda.errors.UDAError`."""
    if not isinstance(value, Mapping):
        raise UDAError(f"{where} must be a mapping of names, not {value!r}.")
    return value


def methods_of(value: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Methods by name: a mapping, the name of a file that holds one and serves several suites, or a list of these."""
    if isinstance(value, list):
        return {name: spec for part in value for name, spec in methods_of(part, path).items()}
    if isinstance(value, str):
        path = path.parent / value
        return methods_of(read_yaml(path), path)
    return {
        str(k): _method(v, f"{path}: methods.{k}", path.parent)
        for k, v in mapping(value, f"{path}: methods").items()
    }


def _method(value: Any, where: str, folder: Path) -> dict[str, Any]:
    """A method: a mapping of ``_METHOD_KEYS``, or a config's file name alone; several are laid one over another."""
    spec = {"config": value} if isinstance(value, str | list) else dict(mapping(value or {}, where))
    check_keys(spec, _METHOD_KEYS, where)
    if isinstance(spec.get("config"), str | list):
        names = [spec["config"]] if isinstance(spec["config"], str) else spec["config"]
        spec["config"] = {}
        for name in names:
            spec["config"] = merged(spec["config"], read_yaml(folder / str(name)))
    mapping(spec.get("overrides") or {}, f"{where}.overrides")
    if spec.get("source") is not None:
        whole(spec["source"], f"{where}.source")
    if "plugins" in spec:
        spec["plugins"] = dict(mapping(spec["plugins"] or {}, f"{where}.plugins"))
    return spec
