"""What an adapter refuses, by name, before it would go wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uda.errors import UDAError

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


def check_model(model: nn.Module) -> None:
    """Refuse what ``torch.compile`` returns: a copy of a model compiled in place runs uncompiled."""
    if any(hasattr(m, "_orig_mod") for m in model.modules()):
        raise UDAError("Adapter: give the model itself, not the result of torch.compile: its layers are replaced.")


def check_head(head: str | None, who: str) -> str:
    """The name of the classifier layer, which ``who`` needs."""
    if head is None:
        raise UDAError(f"{who}: the model has no Linear: name its classifier by Adapter(head=...).")
    return head


def check_optimizer(name: str) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and default options of an optimiser."""
    if name not in OPTIMIZERS:
        raise UDAError(f"unknown optimizer {name!r}: use {', '.join(OPTIMIZERS)}.")
    return OPTIMIZERS[name]


def check_batch(x: Tensor, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape of a sample, the same for the whole stream."""
    if len(x) == 0:
        raise UDAError("Adapter: the batch is empty.")
    if shape is not None and tuple(x.shape[1:]) != shape:
        raise UDAError(f"Adapter: inputs of shape {tuple(x.shape[1:])} after {shape}: resize them alike.")
    if not bool(torch.isfinite(x).all()):
        raise UDAError("Adapter: the batch has NaN or infinite inputs. Remove or impute them.")
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
        raise UDAError("Adapter: float16 autocast needs loss scaling, which there is none here: use bfloat16.")
    return tuple(x.shape[1:])
