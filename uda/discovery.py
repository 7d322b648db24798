"""Finding plugins: the entry-point group ``uda.plugins`` of installed distributions."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from uda.errors import UDAError, nearest
from uda.hooks import hooks_of
from uda.plugin import HOOK_API, Plugin

GROUP = "uda.plugins"
CORE = "uda-lightning"


@dataclass(frozen=True)
class Found:
    """An installed plugin class."""

    name: str
    cls: type[Plugin]
    distribution: str
    version: str

    def row(self) -> dict[str, Any]:
        """Plain form for tables and ``--json``."""
        return {
            "name": self.name,
            "class_path": f"{self.cls.__module__}.{self.cls.__qualname__}",
            "distribution": self.distribution,
            "version": self.version,
            "hooks": hooks_of(self.cls),
            "settings": list(self.cls.settings),
            "summary": (self.cls.__doc__ or "").strip().splitlines()[0] if self.cls.__doc__ else "",
        }


@dataclass
class Registry:
    """What discovery found: plugin classes by name and distributions that could not be loaded."""

    plugins: dict[str, Found] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    clashes: dict[str, list[Found]] = field(default_factory=dict)

    def add(self, found: Found) -> None:
        """Take a class in; two distributions that offer one name clash, and neither has it."""
        if found.name in self.clashes:
            self.clashes[found.name].append(found)
        elif (other := self.plugins.get(found.name)) is not None and other.cls is not found.cls:
            self.clashes[found.name] = [self.plugins.pop(found.name), found]
        else:
            self.plugins[found.name] = found

    @property
    def bare(self) -> bool:
        """Whether there is no plugin but the core's own."""
        return all(f.distribution == CORE for f in self.plugins.values())

    def get(self, name: str) -> type[Plugin]:
        """Class by short name or class path.

        Raises:
            UDAError: unknown (with the nearest names), ambiguous, or from a broken distribution.
        """
        for found in self.plugins.values():
            if name in (found.name, f"{found.cls.__module__}.{found.cls.__qualname__}"):
                return found.cls
        if name in self.clashes:
            paths = [f"{f.cls.__module__}.{f.cls.__qualname__} ({f.distribution})" for f in self.clashes[name]]
            raise UDAError(
                f"Plugin name {name!r} is offered by {len(paths)} distributions: {', '.join(paths)}. "
                "Use the full class path, or uninstall one of them."
            )
        if "." in name:
            return _import(name)
        hint = f" These distributions could not be loaded: {self.broken}." if self.broken else ""
        if self.bare:
            hint += " No plugin distribution is installed: pip install one, for example plugins/uda-adversarial."
        raise UDAError(f"Unknown plugin {name!r}. {nearest(name, self.plugins)}{hint} `uda plugins` lists all.")


def _import(path: str) -> type[Plugin]:
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError) as error:
        raise UDAError(f"Plugin class {path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        raise UDAError(f"{path!r} is no uda.Plugin.")
    return cls


def _load(entry: metadata.EntryPoint, registry: Registry) -> None:
    distribution = entry.dist.name if entry.dist else "unknown"
    version = entry.dist.version if entry.dist else "?"
    where = f"{distribution} {version} (entry point {entry.name} = {entry.value})"
    try:
        cls = entry.load()
        if not (isinstance(cls, type) and issubclass(cls, Plugin)):
            raise TypeError(f"{entry.value} is no subclass of uda.Plugin")
        wanted = getattr(cls, "hook_api", HOOK_API)
        if wanted != HOOK_API:
            raise TypeError(f"it is built for hook API {wanted}, this uda offers {HOOK_API}: install one that fits")
    except Exception as error:  # a broken third-party distribution must not take the others with it
        registry.broken[where] = f"{type(error).__name__}: {error}"
        warnings.warn(f"Plugin distribution skipped: {where}: {type(error).__name__}: {error}", stacklevel=3)
        return
    registry.add(Found(entry.name, cls, distribution, version))


@functools.cache
def registry() -> Registry:
    """Load every entry point once. Discovery never activates: only what a config lists takes part."""
    found = Registry()
    for entry in sorted(metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        _load(entry, found)
    return found


def make_plugin(spec: Plugin | type[Plugin] | str | dict[str, Any]) -> Plugin:
    """A plugin from an object, a class, a name, or ``{"class_path": ..., "init_args": {...}}``.

    Raises:
        UDAError: unknown plugin or argument, with the nearest names.
    """
    if isinstance(spec, Plugin):
        return spec
    if isinstance(spec, type) and issubclass(spec, Plugin):
        return spec()
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UDAError(f"A plugin is an object, a name, or a dict with class_path and init_args; got {spec!r}.")
    cls = registry().get(spec["class_path"])
    arguments = dict(spec.get("init_args") or {})
    check_arguments(cls, arguments)
    return cls(**arguments)


def check_arguments(cls: type[Plugin], arguments: dict[str, Any]) -> None:
    """Raise a :class:`~uda.errors.UDAError` with the nearest names on an argument that ``cls`` does not take."""
    import inspect

    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [n for n in parameters if n != "self"]
    for name in arguments:
        if name not in known:
            raise UDAError(f"Plugin {cls.__name__} has no argument {name!r}. {nearest(name, known)}")
