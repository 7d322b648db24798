"""What all tests share, those of the plugins too."""

from __future__ import annotations

import contextlib
import functools


def pytest_collection_modifyitems() -> None:
    """A Trainer reads the metadata of all distributions when it is made: once is enough."""
    with contextlib.suppress(ImportError, AttributeError):
        from lightning.pytorch.trainer.connectors import callback_connector as connector

        found = functools.cache(connector._load_external_callbacks)
        connector._load_external_callbacks = lambda group: list(found(group))
