"""Short fits on generated domains whose label sets differ."""

from __future__ import annotations

import lightning as L
import pytest
import torch

import uda


@pytest.fixture
def universal_fit():
    """Known classes 0 to 2, source-private 3, target-private 4 and 5: ``fit(plugins, epochs, **model options)``."""

    def fit(plugins, epochs=5, **model_options):
        torch.manual_seed(0)
        data = uda.DataModule(
            uda.data.Generated("blobs", classes=6, n=360, features=8, noise=0.3, seed=4), "source", "target", seed=0,
            setting="universal", classes={"known": 3, "source_private": 1, "target_private": 2}, batch_size=32,
            epoch_steps=20,
        )  # fmt: skip
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
        model = uda.UDA("mlp", plugins, **({"bottleneck": 16} | model_options))
        trainer.fit(model, data)
        return model, data, {k: float(v) for k, v in trainer.callback_metrics.items()}

    return fit
