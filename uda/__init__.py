"""uda: unsupervised domain adaptation on PyTorch Lightning, with methods as plugins."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: public name -> module; resolved on first use, so that `uda --help` does not pay for torch
_PUBLIC = {
    "UDA": "uda.module",
    "Plugin": "uda.plugin",
    "DataNeeds": "uda.plugin",
    "PseudoLabels": "uda.plugin",
    "Prediction": "uda.plugin",
    "Reject": "uda.rejection",
    "hookimpl": "uda.plugin",
    "HOOK_API": "uda.plugin",
    "Step": "uda.step",
    "DomainBatch": "uda.step",
    "Objectives": "uda.gate",
    "Pools": "uda.passes",
    "DataModule": "uda.data",
    "UDAError": "uda.errors",
    "PluginError": "uda.hooks",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from uda.data import DataModule  # noqa: F401
    from uda.errors import UDAError  # noqa: F401
    from uda.gate import Objectives  # noqa: F401
    from uda.hooks import PluginError  # noqa: F401
    from uda.module import UDA  # noqa: F401
    from uda.plugin import HOOK_API, DataNeeds, Plugin, Prediction, PseudoLabels, hookimpl  # noqa: F401
    from uda.rejection import Reject  # noqa: F401
    from uda.step import DomainBatch, Step  # noqa: F401


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in ("data", "diagnostics", "hookspecs", "kernels", "losses", "nn", "optim", "run", "selection", "testing"):
        import importlib

        return importlib.import_module(f"uda.{name}")
    raise AttributeError(f"module 'uda' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
