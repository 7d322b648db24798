"""Which installed methods to try first in which setting."""

from __future__ import annotations

import re
import warnings
from typing import Any

#: Plugin names in the order to try them, as far as they are installed. For label shift and for unequal class sets none
#: that makes the marginal distributions equal.
ORDER: dict[str, tuple[str, ...]] = {
    "none": (),
    "covariate": ("MCC", "CDAN", "DSAN", "FixMatch", "MDD", "SHOT", "DANN", "CORAL", "DAN"),
    "label": ("MCC", "PPOT", "JUMBOT", "SHOT", "NRC"),
    "both": ("MCC", "PPOT", "JUMBOT", "SHOT", "CDAN"),
    "partial": ("PPOT", "BA3US", "PADA", "JUMBOT", "MCC"),
    "open": ("OVANet", "UniOT", "DANCE", "OSBP", "CMU", "UAN"),
}
#: Settings (``Plugin.settings``) whose methods serve where none of these is installed.
SETTINGS: dict[str, tuple[str, ...]] = {"partial": ("partial",), "open": ("open", "universal")}
MOST = 4


def installed() -> dict[str, tuple[str, ...]]:
    """Settings of each installed plugin by its name."""
    from uda.discovery import registry

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: tuple(found.cls.settings) for name, found in registry().plugins.items()}


def try_first(goal: str, plugins: dict[str, tuple[str, ...]], several_sources: bool = False) -> list[str]:
    """Names of installed plugins to try first, best first, at most :data:`MOST`.

    Args:
        goal: a key of :data:`ORDER`.
        plugins: settings of each plugin by name.
        several_sources: only those that serve several sources, if there are any.
    """
    if several_sources and goal != "none":
        fit = {n: s for n, s in plugins.items() if "multi-source" in s}
        plugins = fit or plugins
    by_key = {_key(name): name for name in plugins}
    out = [by_key[_key(name)] for name in ORDER[goal] if _key(name) in by_key]
    if not out:
        wanted = set(SETTINGS.get(goal, ()))
        out = [n for n in sorted(plugins) if wanted & set(plugins[n])]
    return out[:MOST]


def _key(name: Any) -> str:
    return re.sub("[^a-z0-9]", "", str(name).lower())
