"""What a report is made of: a run's files, and the outputs of one of its checkpoints."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from uda.errors import UDAError
from uda.run.directory import newest_checkpoint, read_record
from uda.run.history import read_history

Which = Literal["last", "selected", "oracle"]
TARGET_ACCURACY = "oracle/target_accuracy"


@dataclass
class Outcome:
    """What the model says about the evaluation images of one domain, in index order.

    Attributes:
        name: of the domain; ``is_target``: whether it is the target.
        features: ``[N, F]``; ``probs``: softmax ``[N, C]``.
        label: predicted class ``[N]``, C for unknown; ``score``: confidence ``[N]``.
        y: true class ``[N]``, C for a class that no source has, -1 where there is no label.
        ids: name of each row.
    """

    name: str
    is_target: bool
    features: np.ndarray
    probs: np.ndarray
    label: np.ndarray
    score: np.ndarray
    y: np.ndarray
    ids: list[str]

    @property
    def labelled(self) -> bool:
        """Whether any row has a label."""
        return bool((self.y >= 0).any())

    @property
    def correct(self) -> np.ndarray:
        """Whether each labelled row is right (False without a label)."""
        return (self.y >= 0) & (self.label == self.y)

    @property
    def accuracy(self) -> float | None:
        """Of the labelled rows."""
        known = self.y >= 0
        return float(self.correct[known].mean()) if known.any() else None


@dataclass
class Run:
    """A finished run.

    Attributes:
        name: short, unlike those of other runs of the report; ``path``: its directory.
        config, summary, record: ``config.yaml``, ``summary.json``, ``run.json``.
        history: figures of each validation; ``objectives``: name -> steps and values.
        checkpoint: the file that was evaluated; ``which``: by which rule.
        outcomes: of each domain, sources first; empty where the model was not evaluated.
        source_prior: class shares of the source's training images ``[C]``.
        images: gives pictures ``[H, W, 3]`` (uint8) of target rows, or None where inputs are no images.
        notes: what is missing, and why.
    """

    name: str
    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    record: dict[str, Any]
    history: list[dict[str, Any]]
    objectives: dict[str, tuple[np.ndarray, np.ndarray]]
    checkpoint: Path | None = None
    which: Which = "last"
    checkpoint_step: int | None = None
    class_names: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    source_prior: np.ndarray | None = None
    images: Callable[[Sequence[int]], list[np.ndarray]] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def task(self) -> str:
        """``source, source -> target``."""
        return f"{', '.join(self.summary.get('source') or []) or 'no source'} → {self.summary.get('target')}"

    @property
    def target(self) -> Outcome | None:
        """The target's outcome."""
        return next((o for o in self.outcomes if o.is_target), None)

    @property
    def sources(self) -> list[Outcome]:
        """The sources' outcomes."""
        return [o for o in self.outcomes if not o.is_target]

    @property
    def names_with_unknown(self) -> list[str]:
        """Class names, with ``unknown`` behind them where it occurs on the target."""
        c = len(self.class_names)
        found = self.target is not None and (self.target.y.max(initial=-1) >= c or self.target.label.max() >= c)
        return [*self.class_names, *(["unknown"] if found else [])]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a figure over the validations that have it."""
        rows = [r for r in self.history if math.isfinite(r.get(key, math.nan))]
        return np.array([r["step"] for r in rows], float), np.array([r[key] for r in rows], float)

    def row_of(self, which: Which) -> dict[str, Any] | None:
        """The validation that a rule takes."""
        if which == "last":
            return self.history[-1] if self.history else None
        if which == "selected":
            step = self.summary["selection"]["step"]
            return next((r for r in self.history if r["step"] == step), None) if step is not None else None
        rows = [r for r in self.history if math.isfinite(r.get(TARGET_ACCURACY, math.nan))]
        return max(rows, key=lambda r: r[TARGET_ACCURACY], default=None)


# ------------------------------------------------------------------------------------------------ files


def short_names(paths: Sequence[Path]) -> list[str]:
    """A name for each directory: what of its path is not common to all of them."""
    parts = [list(p.absolute().parts) for p in paths]
    if len(paths) == 1:
        return ["/".join(parts[0][-2:]) if parts[0][-1].startswith("seed") else parts[0][-1]]
    while min(map(len, parts)) > 1 and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    while min(map(len, parts)) > 1 and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    return ["/".join(p) for p in parts]


def read_run(folder: str | Path, name: str = "") -> Run:
    """A run from its directory; the model is not touched.

    Raises:
        UDAError: no directory of a finished run.
    """
    path = Path(folder).expanduser()
    for file in ("config.yaml", "summary.json"):
        if not (path / file).is_file():
            raise UDAError(f"{str(folder)!r} is no directory of a finished run: no {file}. {_hint(path)}")
    summary = json.loads((path / "summary.json").read_text())
    config = yaml.safe_load((path / "config.yaml").read_text())
    history = read_history(path)
    run = Run(name or short_names([path])[0], path, config, summary, read_record(path), history, {})
    logged = logged_rows(path / "logs" / "metrics.csv")
    run.objectives = columns(logged or history, "train/")
    if not run.history:
        run.history = validations(logged)
    return run


def _hint(path: Path) -> str:
    if not path.is_dir():
        return "There is no such directory."
    below = sorted(f.parent for f in [*path.glob("*/summary.json"), *path.glob("*/*/summary.json")])
    if below:
        return f"Below it are {', '.join(map(str, below[:4]))}{' and others' if len(below) > 4 else ''}."
    return "`uda fit` writes one; a run that was stopped goes on with --ckpt_path last."


def logged_rows(file: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``; ``step`` counts the steps that are done, as in the history."""
    if not file.is_file():
        return []
    with file.open(newline="") as lines:
        rows = [{k: float(v) for k, v in row.items() if k and v} for row in csv.DictReader(lines)]
    return [{**row, "step": row["step"] + 1} for row in rows if "step" in row]


def validations(rows: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The rows that come from a validation."""
    own = ("source_accuracy", "oracle/", "select/")
    return [
        {**r, "step": int(r["step"]), "epoch": int(r.get("epoch", 0))}
        for r in rows
        if any(k.startswith(own) for k in r)
    ]


def columns(rows: Sequence[dict[str, Any]], prefix: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each name with a prefix, which is cut off; what is not finite is left out."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for key, value in row.items():
            if key.startswith(prefix) and math.isfinite(value):
                steps, values = found.setdefault(key.removeprefix(prefix), ([], []))
                steps.append(row["step"])
                values.append(value)
    return {k: (np.array(s, float), np.array(v, float)) for k, (s, v) in found.items()}


# ------------------------------------------------------------------------------------------- the model


def pick_checkpoint(run: Run, which: Which) -> Path:
    """The file that holds the weights of a rule.

    A fit keeps the last epoch and the selected one. The best epoch by target labels is kept only by chance, or by a
    ``ModelCheckpoint`` of every epoch: it is looked for by its step.

    Raises:
        UDAError: there is none.
    """
    folder = run.path / "checkpoints"
    if which == "last" and (found := newest_checkpoint(run.path)) is not None:
        return found
    if which == "selected" and (folder / "selected.ckpt").is_file():
        return folder / "selected.ckpt"
    if which == "oracle" and (row := run.row_of("oracle")) is not None:
        for file in sorted(folder.glob("*.ckpt")):
            if step_of(file) == row["step"]:
                return file
        raise UDAError(
            f"{run.path}: no checkpoint of the oracle's epoch {row['epoch']} (step {row['step']}) was kept, as nothing "
            "may be kept by target labels. Keep every epoch with a ModelCheckpoint(save_top_k=-1), or take "
            "--checkpoint last or selected."
        )
    if which == "oracle":
        raise UDAError(f"{run.path}: the target has no labels, so there is no oracle. Take --checkpoint last.")
    raise UDAError(f"{run.path}: no {which} checkpoint in {folder.name}/.")


def step_of(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint."""
    import torch

    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def load_data(config: dict[str, Any], root: str | None = None) -> Any:
    """The data module of a run's config, with the run's seed; ``root`` replaces the reader's folder."""
    from jsonargparse import ArgumentError, ArgumentParser

    from uda.data import DataModule
    from uda.lightning_cli import import_named_classes

    import_named_classes()
    settings = json.loads(json.dumps(config["data"]))
    settings["num_workers"] = 0
    if settings.get("seed") is None:
        seed = config.get("seed_everything")
        settings["seed"] = int(seed) if isinstance(seed, int) and not isinstance(seed, bool) else 0
    if root is not None:
        settings["reader"]["init_args"] = {**settings["reader"].get("init_args", {}), "root": root}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DataModule, "data")
    try:
        return parser.instantiate_classes(parser.parse_object({"data": settings})).data
    except ArgumentError as error:
        raise UDAError(f"the data section of config.yaml cannot be built: {error}") from error


def evaluate(run: Run, which: Which, device: str = "auto", root: str | None = None) -> None:
    """Fill in what needs the model: outcomes of all domains, class names, source prior and pictures.

    Raises:
        UDAError: no such checkpoint, or data that cannot be read.
    """
    import torch

    from uda.module import UDA

    run.checkpoint, run.which = pick_checkpoint(run, which), which
    run.checkpoint_step = step_of(run.checkpoint)
    data = load_data(run.config, root)
    data.setup("validate")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = UDA.load_from_checkpoint(run.checkpoint, map_location=device, weights_only=True).eval()
    if list(model.class_names or data.class_names) != data.class_names:
        raise UDAError(f"{run.path}: the data has other classes now than when the run was trained.")
    run.class_names = data.class_names
    run.outcomes = [
        walk(model, name, is_target, loader, data.ids(name))
        for name, is_target, loader in zip(
            data.eval_domains("val"), data.eval_is_target("val"), data.val_dataloader(), strict=True
        )
    ]
    run.source_prior = source_prior(data)
    run.images = pictures(data)
    if model.hooks.filled("adapt"):
        run.notes.append("Target figures are with test-time adaptation on one pass over the target, in its order.")


def walk(model: Any, name: str, is_target: bool, loader: Any, ids: list[str]) -> Outcome:
    """One domain through the model in evaluation mode; the target is adapted to where a plugin adapts."""
    import torch

    from uda import running
    from uda.step import DomainBatch

    parts: list[dict[str, Any]] = []
    with torch.no_grad():
        for batch in loader:
            batch = {k: v.to(model.device) for k, v in batch.items()}
            x = {"x": batch["x"], "index": batch["index"]}
            domain = DomainBatch(model, name, "target" if is_target else "source", x)
            if is_target and model.hooks.filled("adapt"):
                running.adapt(model, domain)
            p = model.predict_batch(domain)
            label = p.label if p.unknown is None else torch.where(p.unknown, model.num_classes, p.label)
            y = batch.get("y", torch.full_like(label, -1))
            found = {
                "features": domain.features.flatten(1).float(), "probs": domain.logits.float().softmax(1),
                "label": label, "score": p.score.float(), "y": y, "index": batch["index"],
            }  # fmt: skip
            parts.append({k: v.cpu().numpy() for k, v in found.items()})
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    order = np.argsort(whole.pop("index"), kind="stable")
    return Outcome(name, is_target, **{k: v[order] for k, v in whole.items()}, ids=ids)


def source_prior(data: Any) -> np.ndarray | None:
    """Class shares that the classifier was trained on ``[C]``, sources weighted equally; None without a source."""
    if not data.task.sources:
        return None
    counts = [np.bincount(p.train.labels.numpy(), minlength=data.num_classes) for p in data.task.sources]
    if data.sampling == "class_balanced":
        counts = [(c > 0).astype(float) for c in counts]
    return np.mean([c / c.sum() for c in counts], axis=0)


def pictures(data: Any) -> Callable[[Sequence[int]], list[np.ndarray]] | None:
    """A function from evaluation rows of the target to pictures, as they are before any view."""
    pools = data.task.target
    if pools.data.inputs.kind == "features":
        return None

    def fetch(rows: Sequence[int]) -> list[np.ndarray]:
        import torch

        raw = pools.data.inputs.fetch(torch.as_tensor(pools.eval.rows[np.asarray(rows, dtype=np.int64)]))
        return [picture(x) for x in raw]

    return fetch


def picture(x: Any) -> np.ndarray:
    """One input, a PIL image or a tensor ``[1 or 3, H, W]``, as uint8 ``[H, W, 3]``; other ranges are stretched."""
    if not hasattr(x, "numpy"):
        return np.asarray(x.convert("RGB"))
    a = np.asarray(x.numpy(), dtype=np.float64)
    if a.min() < -1e-6 or a.max() > 1 + 1e-6:
        a = (a - a.min()) / max(np.ptp(a), 1e-12)
    a = np.moveaxis(a[:3] if a.shape[0] >= 3 else np.repeat(a[:1], 3, axis=0), 0, -1)
    return np.round(255 * a.clip(0, 1)).astype(np.uint8)
