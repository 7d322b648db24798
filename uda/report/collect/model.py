"""The evaluation images of a run, once more through one of its checkpoints."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from uda.errors import UDAError
from uda.report.collect.checkpoints import pick_checkpoint, step_of
from uda.report.collect.images import pictures
from uda.report.collect.run import Outcome, Run, Which


def load_data(config: dict[str, Any], root: str | None = None) -> Any:
    """The data module of a run's config, with the run's seed; ``root`` replaces the reader's folder."""
    from jsonargparse import ArgumentError, ArgumentParser

    from uda.arguments import instantiated
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
        return instantiated(parser, parser.parse_object({"data": settings})).data
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
            label = p.marked(model.num_classes)
            y = batch.get("y", torch.full_like(label, -1)).clamp(max=model.num_classes)
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
