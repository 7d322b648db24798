"""Networks and their parts: backbones, heads, gradient reversal, banks, EMA teachers, domain-wise layers.

Names load on first use, so that ``import uda.nn`` is cheap and optional packages stay optional.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "backbones": ("MLP", "Backbone", "EfficientNetLite", "Identity", "SmallCNN", "Timm", "TorchVision"),
    "bank": ("Bank", "gather_domain", "gather_rows"),
    "domain": (
        "ActiveDomain", "DomainBatchNorm", "PerDomain", "active_domain", "convert_batchnorm",
        "domain_context", "domain_feature_size", "spread_batchnorm",
    ),
    "ema": ("EMATeacher",),
    "factory": ("feature_size", "make_backbone", "use_channels_last"),
    "heads": (
        "Bottleneck", "CosineHead", "DomainDiscriminator", "LinearHead", "WeightNormHead", "class_vectors", "make_head",
    ),
    "precision": ("full", "no_autocast"),
    "reversal": ("ramp", "reverse_gradient", "warm_start", "warm_start_iterations"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
