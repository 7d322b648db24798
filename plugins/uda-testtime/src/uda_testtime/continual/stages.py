"""The loop over fits: adapt, hand on, measure; interrupted anywhere, it goes on with what is not there yet."""

from __future__ import annotations

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml

from uda.arguments import Arguments
from uda.commands.inspect import built, loaded
from uda.data import DataModule
from uda.errors import UDAError, nearest
from uda.metrics.names import oracle
from uda.module import UDA
from uda_testtime.continual.exemplars import domain_features, with_domain
from uda_testtime.continual.measures import sequence_measures
from uda_testtime.continual.plan import Plan, with_files
from uda_testtime.domains import Once, with_target

#: Runs ``uda`` with these words; its exit code.
Launch = Callable[[list[str]], int]


def write_once(path: Path, write: Callable[[Path], Any]) -> Path:
    """Make a file, whole or not at all; one that exists is left as it is."""
    if not path.exists():
        beside = path.with_name(f".{path.name}")
        write(beside)
        os.replace(beside, path)
    return path


def write_json(path: Path, content: Any) -> Path:
    """The same with JSON."""
    return write_once(path, lambda p: p.write_text(json.dumps(content, indent=2) + "\n"))


@contextmanager
def written(config: dict[str, Any]) -> Iterator[Path]:
    """A config as a file, for a while."""
    with tempfile.TemporaryDirectory(prefix="uda-") as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config, sort_keys=False))
        yield file


def built_data(config: dict[str, Any]) -> Any:
    """The data module of a config all of which is checked; its model is made without the backbone."""
    with written(config) as file:
        return built(["--config", str(file)], "identity", "continual")[1]


def check_names(config: dict[str, Any]) -> None:
    """Refuse settings that do not exist, without making anything."""
    with written(config) as file:
        sections = {"model": UDA, "data": DataModule, "trainer": L.Trainer}
        Arguments("fit", sections, file.parent).prepare(["--config", str(file)])


class Stopped(Exception):
    """A fit ended before its end."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class Sequence:
    """Walks a plan. Each step leaves a file, and is left out where the file exists.

    Args:
        plan: what to do; launch: runs a fit.
    """

    def __init__(self, plan: Plan, launch: Launch) -> None:
        self.plan, self.launch = plan, launch
        self._data: Any = None
        self.rows: list[dict[str, Any]] = []

    # ------------------------------------------------------------------------------------------------ data

    @property
    def data(self) -> Any:
        """The data module of the source's stage; each domain is read once."""
        if self._data is None:
            self._data = built_data(self.plan.source_fit())
            self._data.reader = Once(self._data.reader)
        return self._data

    def check(self) -> None:
        """Read all domains and check what can be checked before hours of training; nothing is written.

        Raises:
            UDAError: unknown settings or domains, other classes or shapes, a method that is not there.
        """
        known = self.data.reader.domains()
        if strange := [n for n in self.plan.shifts if n not in known]:
            raise UDAError(f"--shifts: unknown domain {strange[0]!r}. {nearest(strange[0], known)}")
        for name in self.plan.shifts:
            with_target(self.data, name).setup("test")
        check_names(self.plan.fit(self.plan.config, self.plan.shifts[0], None))

    def _trainer(self) -> L.Trainer:
        given = self.plan.config.get("trainer") or {}
        kept = {k: given[k] for k in ("accelerator", "precision") if k in given}
        return L.Trainer(
            **kept, devices=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, inference_mode=False, default_root_dir=str(self.plan.out),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------- the steps

    def fit(self, config: dict[str, Any], folder: Path) -> str:
        """One `uda fit`, resumed where it was interrupted; its last checkpoint.

        Raises:
            Stopped: it did not come to its end.
        """
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if not (folder / "summary.json").is_file():
            file = folder.with_name(f"{folder.name}.yaml")
            file.parent.mkdir(parents=True, exist_ok=True)
            write_once(file, lambda p: p.write_text(yaml.safe_dump(config, sort_keys=False)))
            words = ["fit", "--config", str(file), "--run_dir", str(folder)]
            if code := self.launch([*words, *(["--ckpt_path", "last"] if (folder / "run.json").is_file() else [])]):
                raise Stopped(code)
        if not checkpoint.is_file():
            raise UDAError(f"{folder} has no checkpoints/last.ckpt: leave trainer.enable_checkpointing on.")
        return str(checkpoint)

    def accuracy(self, model: Any, name: str) -> dict[str, float]:
        """Figures of a model on one domain as the target, by its own way of predicting."""
        trainer = self._trainer()
        trainer.test(model, datamodule=with_target(self.data, name), verbose=False)
        return {k.removeprefix("test/"): float(v) for k, v in trainer.callback_metrics.items()}

    def labels(self, checkpoint: str, name: str, file: Path) -> Path:
        """The adapted model's label of each sample of a target's training pool."""

        def write(path: Path) -> None:
            part = with_target(self.data, name)
            part.predict_dataloader = lambda: [part.pool_dataloader(name)]
            found = self._trainer().predict(loaded(checkpoint), datamodule=part)
            index, y = (torch.cat([o[k] for o in found]).cpu() for k in ("index", "label"))
            torch.save({"y": y[index.argsort()].long()}, path)

        return write_once(file, write)

    def remember(self, checkpoint: str, stage: int) -> Path:
        """The memory with the exemplars of a stage's domain; the source has its labels, others those of the model."""

        def write(path: Path) -> None:
            model, plan = loaded(checkpoint), self.plan
            memory = None if stage == 0 else torch.load(plan.folder(stage - 1) / "memory.pt", weights_only=True)
            for name in self.data.source_names if stage == 0 else [plan.shifts[stage - 1]]:
                part = self.data if stage == 0 else with_target(self.data, name)
                f, y = domain_features(model, part.pool_dataloader(name))
                y = torch.load(plan.folder(stage) / "labels.pt", weights_only=True)["y"] if y is None else y

                def take(rows: torch.Tensor, part: Any = part, name: str = name) -> torch.Tensor:
                    return part.samples(name, rows.numpy(), 0, "test")["x"]

                memory = with_domain(memory, f, y, take, plan.memory, model.num_classes)
            torch.save(memory, path)

        return write_once(self.plan.folder(stage) / "memory.pt", write)

    def measure(self, checkpoint: str, stage: int, adapted: str | None = None) -> dict[str, Any]:
        """The accuracies of the model that a stage hands on, on all domains, as ``measured.json``."""
        file = self.plan.folder(stage) / "measured.json"
        if not file.is_file():
            model, figures, source = loaded(checkpoint), {}, None
            for name in self.plan.shifts:
                found = self.accuracy(model, name)
                figures[name], source = found.get(oracle("target_accuracy")), found.get("source_accuracy", source)
            row = {"checkpoint": checkpoint, "source_accuracy": source, "oracle_accuracy": figures}
            if adapted is not None:
                name = self.plan.shifts[stage - 1]
                found = self.accuracy(loaded(adapted), name)
                row |= {"adapted_checkpoint": adapted, "oracle_adapted": found.get(oracle("target_accuracy"))}
            write_json(file, row)
        return json.loads(file.read_text())

    # -------------------------------------------------------------------------------------------- the walk

    def run(self) -> dict[str, Any]:
        """All stages; the summary.

        Raises:
            Stopped: a fit was interrupted or failed.
        """
        plan = self.plan
        start = (plan.config.get("model") or {}).get("init_from")
        general, folder = plan.general is not None, plan.folder(0)
        checkpoint = start or self.fit(plan.source_fit(), folder / "fit")
        folder.mkdir(parents=True, exist_ok=True)
        self.rows = [self.measure(checkpoint, 0)]
        memory = self.remember(checkpoint, 0) if general and self.data.source_names else None
        for stage, name in enumerate(plan.shifts, start=1):
            folder = plan.folder(stage)
            adapted = self.fit(plan.fit(plan.config, name, checkpoint), folder / ("adapt" if general else "fit"))
            if general:
                files = {"labels": str(self.labels(adapted, name, folder / "labels.pt"))}
                files |= {} if memory is None else {"memory": str(memory)}
                config = plan.fit(with_files(plan.general, files), name, checkpoint)
                checkpoint = self.fit(config, folder / "generalise")
                memory = self.remember(checkpoint, stage) if memory is not None else None
            else:
                checkpoint = adapted
            self.rows.append(self.measure(checkpoint, stage, adapted if general else None))
        return self.finish()

    def finish(self) -> dict[str, Any]:
        """``summary.json`` and ``accuracies.csv``."""
        out, shifts = self.plan.out, self.plan.shifts
        source = "source" if self.rows[0]["source_accuracy"] is not None else None
        rows = [{"source": r["source_accuracy"], **r["oracle_accuracy"]} for r in self.rows]
        adapted = [r.get("oracle_adapted") for r in self.rows[1:]]
        summary = {
            **self.plan.told(), "stages": ["source", *shifts], "oracle_accuracies": rows,
            "oracle_measures": sequence_measures(rows, shifts, source),
            "oracle_adapted": dict(zip(shifts, adapted, strict=True)) if self.plan.general else None,
            "checkpoints": [r["checkpoint"] for r in self.rows],
        }  # fmt: skip
        write_json(out / "summary.json", summary)

        def write(path: Path) -> None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["after", "source", *shifts])
                writer.writeheader()
                writer.writerows({"after": n, **r} for n, r in zip(summary["stages"], rows, strict=True))

        write_once(out / "accuracies.csv", write)
        return summary
