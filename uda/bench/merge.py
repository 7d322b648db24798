"""Configs as nested mappings: laying one over another, dotted keys, environment variables, and a hash."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Mapping
from typing import Any

from uda.errors import UDAError

_SPEC = ("class_path", "init_args", "dict_kwargs")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
#: settings that change no result: a run that differs in nothing else is the same run
_NO_EFFECT = {
    "trainer": {
        "default_root_dir", "logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
        "profiler", "log_every_n_steps",
    },
    "data": {"num_workers", "pin_memory", "eval_batch_size"},
}  # fmt: skip


def copied(value: Any) -> Any:
    """Plain data of their own: ``copy.deepcopy`` takes ten times as long, and a suite of a thousand runs feels it."""
    if type(value) is dict:
        return {k: copied(v) for k, v in value.items()}
    if type(value) is list:
        return [copied(v) for v in value]
    return value if value is None or type(value) in (str, int, float, bool) else copy.deepcopy(value)


def merged(below: Any, above: Any) -> Any:
    """``above`` laid over ``below``; mappings join, everything else replaces.

    Another ``class_path`` replaces the whole entry: arguments of one class mean nothing to the next.
    """
    if not (isinstance(below, Mapping) and isinstance(above, Mapping)):
        return copied(above)
    if "class_path" in above and above["class_path"] != below.get("class_path", above["class_path"]):
        return copied(dict(above))
    out = copied(dict(below))
    for key, value in above.items():
        out[key] = merged(out.get(key), value)
    return out


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with dotted keys set, as on the command line: ``{"model.plugins.align.weight": 0.3}``.

    Where a class is configured on the way, ``init_args`` may be left out. A mapping as a value is laid over
    what is there.

    Raises:
        UDAError: a key leads through something that is no mapping.
    """
    out = copied(dict(config))
    for dotted, value in overrides.items():
        node, parts = out, str(dotted).split(".")
        for i, part in enumerate(parts[:-1]):
            node = _into(_arguments(node, part), part, ".".join(parts[: i + 1]), dotted)
        node = _arguments(node, parts[-1])
        node[parts[-1]] = merged(node.get(parts[-1]), value)
    return out


def _arguments(node: dict[str, Any], part: str) -> dict[str, Any]:
    """Where ``part`` belongs: beside ``class_path``, or among the arguments of the class."""
    if "class_path" in node and part not in _SPEC:
        if not isinstance(node.get("init_args"), dict):
            node["init_args"] = {}
        return node["init_args"]
    return node


def _into(node: dict[str, Any], part: str, where: str, dotted: str) -> dict[str, Any]:
    below = node.get(part)
    if below is None:
        below = node[part] = {}
    if isinstance(below, str) and part in ("backbone", "reader", "views", "optimizer", "schedule"):
        below = node[part] = {"class_path": below}
    if not isinstance(below, dict):
        raise UDAError(f"override {dotted!r}: {where!r} is {below!r}, which holds no settings.")
    return below


def expanded(value: Any, used: dict[str, str] | None = None) -> Any:
    """``${NAME}`` and ``${NAME:-default}`` in all strings, from the environment.

    Args:
        value: plain data.
        used: takes ``expanded text -> text as written``, so that records can name the variable and not the
            folder of one machine.

    Raises:
        UDAError: a variable without default that is not set.
    """
    if isinstance(value, Mapping):
        return {k: expanded(v, used) for k, v in value.items()}
    if isinstance(value, list):
        return [expanded(v, used) for v in value]
    if not isinstance(value, str) or "${" not in value:
        return value

    def lookup(found: re.Match[str]) -> str:
        text = os.environ.get(found[1]) or found[2]
        if text is None:
            raise UDAError(f"{value!r}: the environment variable {found[1]} is not set.")
        return text

    text = _VARIABLE.sub(lookup, value)
    if used is not None:
        used[text] = value
    return text


def folded(value: Any, used: Mapping[str, str]) -> Any:
    """The reverse of :func:`expanded`: strings that came from variables, as they were written."""
    if isinstance(value, Mapping):
        return {k: folded(v, used) for k, v in value.items()}
    if isinstance(value, list):
        return [folded(v, used) for v in value]
    return used.get(value, value) if isinstance(value, str) else value


def content_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of a config, less what changes no result."""
    kept = {
        name: {k: v for k, v in part.items() if k not in _NO_EFFECT.get(name, ())}
        if isinstance(part, Mapping)
        else part
        for name, part in config.items()
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]
