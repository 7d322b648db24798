"""What a model asks of the data when it does not say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class DefaultNeeds:
    """Labelled source and unlabelled target batches, plain view only."""

    source: bool = True
    target: bool = True
    held_out: bool = False
    views: frozenset[str] = frozenset()
    source_views: frozenset[str] = frozenset()
    class_balanced: bool = False


def needs_of(trainer: Any) -> Any:
    """The ``data_needs`` of the trainer's model, or the default."""
    model = getattr(trainer, "lightning_module", None) if trainer is not None else None
    return getattr(model, "data_needs", None) or DefaultNeeds()
