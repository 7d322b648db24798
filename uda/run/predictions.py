"""Predictions and evaluation results as files beside the run."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from uda.metrics.names import MEASURES, SOURCE_FIGURES, oracle
from uda.run.directory import numbered_file
from uda.run.figures import figures_of, measures_of, percent, rounded, setting_of
from uda.run.summary import device_of, versions


class PredictionWriter(L.Callback):
    """Writes ``predictions.csv``: index, id, label, score, unknown, unknown_score, class; probabilities if asked for.

    ``label`` is the name of the class or ``unknown``, ``class`` that of the class, marked or not. Rows are in the order
    of the target's evaluation pool; those of all ranks are gathered.

    Args:
        dirpath: folder of the file; an existing one is kept, and the new one numbered.
        probabilities: add one column a class.
    """

    def __init__(self, dirpath: str | Path, probabilities: bool = False) -> None:
        self.dirpath, self.probabilities = Path(dirpath), probabilities
        self.path: Path | None = None
        self._parts: list[dict[str, torch.Tensor]] = []

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep what is written at the end."""
        names = ["index", "label", "score", "unknown", "unknown_score", *(["probs"] if self.probabilities else [])]
        self._parts.append({n: outputs[n].detach().cpu() for n in names})

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather over ranks, and write on rank 0."""
        merged = {n: torch.cat([p[n] for p in self._parts]) for n in self._parts[0]} if self._parts else {}
        self._parts = []
        shares = [merged]
        if trainer.world_size > 1:
            shares = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(shares, merged)
        if not trainer.is_global_zero:
            return
        shares = [s for s in shares if s]
        rows = {n: torch.cat([s[n] for s in shares]) for n in shares[0]} if shares else {}
        self.dirpath.mkdir(parents=True, exist_ok=True)
        self.path = numbered_file(self.dirpath, "predictions.csv")
        self._write(trainer, pl_module, rows)
        print(f"{len(rows.get('index', ()))} predictions: {self.path}")

    def _write(self, trainer: L.Trainer, model: Any, rows: dict[str, torch.Tensor]) -> None:
        ids = trainer.datamodule.ids(model.target_name) if hasattr(trainer.datamodule, "ids") else None
        names = list(model.class_names or map(str, range(model.num_classes)))
        header = ["index", "id", "label", "score", "unknown", "unknown_score", "class"]
        header += [f"p({n})" for n in names] if self.probabilities else []
        with self.path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for i in torch.argsort(rows["index"]).tolist() if rows else []:
                index, unknown = int(rows["index"][i]), bool(rows["unknown"][i])
                named, score, strange = (rows[n][i].item() for n in ("label", "score", "unknown_score"))
                line = [
                    index,
                    index if ids is None else ids[index],
                    "unknown" if unknown else names[named],
                    f"{score:.6f}",
                    int(unknown),
                    f"{strange:.6f}",
                    names[named],
                ]
                if self.probabilities:
                    line += [f"{p:.6f}" for p in rows["probs"][i].tolist()]
                writer.writerow(line)


class EvaluationWriter(L.Callback):
    """Writes ``test.json`` or ``validate.json`` with the figures of one evaluation.

    Args:
        dirpath: folder of the file; an existing one is kept, and the new one numbered.
        checkpoint: what was evaluated, for the record.
    """

    def __init__(self, dirpath: str | Path, checkpoint: str | None = None) -> None:
        self.dirpath, self.checkpoint = Path(dirpath), checkpoint

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``test.json``."""
        self._write(trainer, pl_module, "test", "test/")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write ``validate.json``."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "validate", "")

    def _write(self, trainer: L.Trainer, model: Any, stage: str, prefix: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        figures = figures_of(trainer, prefix)
        result = {
            "checkpoint": self.checkpoint,
            **{k: rounded(figures.get(k)) for k in SOURCE_FIGURES if k == "source_accuracy" or k in figures},
            **{m: rounded(figures.get(oracle(m))) for m in measures_of(figures)},
            "select": {
                k.removeprefix("select/"): rounded(v) for k, v in figures.items() if k.startswith("select/")
            },
            "source": list(model.source_names),
            "target": model.target_name,
            **setting_of(getattr(trainer, "datamodule", None)),
            "versions": versions(model),
            **device_of(trainer),
        }
        self.dirpath.mkdir(parents=True, exist_ok=True)
        path = numbered_file(self.dirpath, f"{stage}.json")
        path.write_text(json.dumps(result, indent=2) + "\n")
        names = ("source_accuracy", "target_accuracy", "target_class_accuracy")
        source, instance, mean = (percent(result[k]) for k in names)
        headline = result["headline"]
        more = "" if headline in names else f", {MEASURES[headline]} {percent(result.get(headline))}"
        print(f"accuracy, %: source {source}, target {instance} (class mean {mean}){more}. All figures: {path}")
