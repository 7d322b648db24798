"""The one choke point for hook calls: order, names in errors, profiler spans."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pluggy

from uda import hookspecs
from uda.errors import UDAError, nearest
from uda.plugin import Plugin

HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(f).parameters)
    for name, f in vars(hookspecs).items()
    if inspect.isfunction(f) and hasattr(f, "uda_spec")
}


class PluginError(RuntimeError):
    """An exception inside a plugin, with the plugin's key and the hook in its text."""


def hooks_of(cls: type) -> list[str]:
    """Hooks that a plugin class fills, in the order of :mod:`uda.hookspecs`."""
    return [h for h in HOOKS if hasattr(inspect.getattr_static(cls, h, None), "uda_impl")]


class Hooks:
    """Plugins of one model, registered with a plugin manager of their own.

    pluggy checks names and argument lists; calls go through :meth:`each`, in config order.
    """

    def __init__(self, plugins: dict[str, Plugin]) -> None:
        self.plugins = plugins
        self.manager = pluggy.PluginManager("uda")
        self.manager.add_hookspecs(hookspecs)
        for key, plugin in reversed(plugins.items()):  # pluggy calls the last registered first
            self._check(key, plugin)
            self.manager.register(plugin, name=key)
        try:
            self.manager.check_pending()
        except pluggy.PluginValidationError as error:
            name = str(error).split("'")[1] if "'" in str(error) else ""
            raise UDAError(
                f"Plugin {error.plugin.key!r} ({type(error.plugin).__name__}) fills a hook that does not exist: "
                f"{name!r}. {nearest(name, HOOKS)}"
            ) from error
        self._calls = {hook: list(self._callers(hook)) for hook in HOOKS}
        self.profile: Callable[[str], AbstractContextManager] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"plugins": self.plugins}  # the manager is made anew around the copied plugins

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["plugins"])  # type: ignore[misc]

    def _check(self, key: str, plugin: Plugin) -> None:
        for name, member in inspect.getmembers_static(type(plugin)):
            marked = getattr(member, "uda_impl", None)
            if marked is None:
                continue
            if marked["wrapper"] or marked["hookwrapper"]:
                raise UDAError(f"Plugin {key!r}: {name} is a hook wrapper. Plugins fill hooks, they do not wrap them.")
            if name in HOOKS:
                given = set(list(inspect.signature(member).parameters)[1:])
                if wrong := sorted(given - set(HOOKS[name])):
                    raise UDAError(
                        f"Plugin {key!r} ({type(plugin).__name__}): hook {name!r} has no argument {wrong[0]!r}. "
                        f"It offers {', '.join(HOOKS[name])}."
                    )

    def _callers(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        caller = getattr(self.manager.hook, hook)
        for impl in reversed(caller.get_hookimpls()):
            others = [p for p in self.manager.get_plugins() if p is not impl.plugin]
            yield impl.plugin_name, self.manager.subset_hook_caller(hook, others)

    def filled(self, hook: str) -> bool:
        """Whether any plugin fills the hook."""
        return bool(self._calls[hook])

    def fillers(self, hook: str) -> list[str]:
        """Keys of the plugins that fill the hook, in call order."""
        return [key for key, _ in self._calls[hook]]

    def _call(self, hook: str, key: str, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        span = self.profile(f"[uda]{hook}:{key}") if self.profile else nullcontext()
        try:
            with span:
                results = call(**arguments)
        except (UDAError, PluginError):
            raise
        except Exception as error:
            raise PluginError(f"Plugin {key!r} failed in hook {hook!r}: {type(error).__name__}: {error}") from error
        return results[0] if results else None

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """Call the plugins one by one; yields ``(key, result)`` where the result is not None."""
        for key, call in self._calls[hook]:
            result = self._call(hook, key, call, arguments)
            if result is not None:
                yield key, result

    def chain(self, hook: str, name: str, **arguments: Any) -> Any:
        """Pass the argument ``name`` through the plugins: each result replaces it for the next."""
        for key, call in self._calls[hook]:
            result = self._call(hook, key, call, arguments)
            if result is not None:
                arguments[name] = result
        return arguments[name]

    def first(self, hook: str, **arguments: Any) -> tuple[str, Any] | tuple[None, None]:
        """Call until one plugin gives a result: ``(key, result)``, or ``(None, None)``."""
        return next(self.each(hook, **arguments), (None, None))

    def all(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """Call every plugin."""
        return list(self.each(hook, **arguments))


def require_manual(plugins: Iterable[Plugin]) -> None:
    """``optimise`` only on plugins marked manual, and at most one of these."""
    manual = [p for p in plugins if p.manual]
    if len(manual) > 1:
        raise UDAError(
            f"Plugins {', '.join(repr(p.key) for p in manual)} all step the optimisers by hand: keep one of them."
        )
    for p in plugins:
        if not p.manual and "optimise" in hooks_of(type(p)):
            raise UDAError(f"Plugin {p.key!r} fills the hook 'optimise' but is not marked manual = True.")
