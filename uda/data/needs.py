"""What the model of a run asks of the data."""

from __future__ import annotations

from typing import Any

from uda.plugin import DataNeeds


def needs_of(trainer: Any) -> DataNeeds:
    """The ``data_needs`` of the trainer's model, or the default: labelled source, unlabelled target, plain view."""
    model = getattr(trainer, "lightning_module", None) if trainer is not None else None
    return getattr(model, "data_needs", None) or DataNeeds()
