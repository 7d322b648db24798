"""The config of a run, as a file in its directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import yaml


class SaveConfig(L.Callback):
    """Writes ``config.yaml``: complete, and good for ``--config`` of all four commands."""

    def __init__(self, folder: Path, config: dict[str, Any], resumed: bool) -> None:
        self.folder, self.config, self.resumed = folder, config, resumed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write it once training is sure to begin; a resumed run with other settings keeps both."""
        if not trainer.is_global_zero:
            return
        text = yaml.safe_dump(self.config, sort_keys=False)
        path, number = self.folder / "config.yaml", 1
        while path.is_file() and self.resumed and path.read_text() != text:
            number += 1
            path = self.folder / f"config-{number}.yaml"
        path.write_text(text)
