"""What each sub-prototype of a memory holds: a picture and a table, made at the end of a fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uda.nn import domain_context
from uda.running import batches_done, total_batches

if TYPE_CHECKING:
    import uda
    from uda_universal.memspm import MemSPM

MOST, EACH = 24, 6


@torch.no_grad()
def held(plugin: MemSPM, model: uda.UDA) -> dict[str, Any]:
    """Walk the training pools of this rank once: nearest samples and counts of each sub-prototype.

    Returns:
        ``source``: samples by sub-prototype and class ``[N S, C]``, ``target``: samples ``[N S]`` (each counts for the
        first sub-prototype that it addresses); ``weight``: of the nearest samples ``[N S, EACH]``, falling; ``x``:
        their inputs ``[N S, EACH, ...]`` where the inputs are images, else None; ``is_target`` ``[N S, EACH]``.
    """
    size, trainer = plugin.items * plugin.subs, model.trainer
    source, target = torch.zeros(size, model.num_classes), torch.zeros(size)
    image = len(model.input_shape) == 3 and model.input_shape[0] in (1, 3)
    best, best_x = torch.full((size, EACH), -2.0), torch.zeros(size, EACH, *model.input_shape) if image else None
    is_target = torch.zeros(size, EACH, dtype=torch.bool)
    for name in (*model.source_names, model.target_name):
        role = "target" if name == model.target_name else "source"
        for batch in trainer.datamodule.pool_dataloader(name):
            batch = trainer.strategy.batch_to_device(batch, model.device)
            own = model.owned_rows(batch["index"])
            x = batch["x"][own]
            with domain_context(name, role):
                z = model.bottleneck(model.backbone(x))
            _, item, sub = plugin.addressed(z)
            row = (item * plugin.subs + sub)[:, 0]
            nearness = torch.nn.functional.cosine_similarity(z.float(), plugin.memory.flatten(0, 1)[row], dim=1).cpu()
            row = row.cpu()
            if role == "target":
                target += torch.bincount(row, minlength=size)
            else:
                flat = row * model.num_classes + batch["y"][own].cpu()
                source += torch.bincount(flat, minlength=source.numel()).view_as(source)
            for r in row.unique().tolist():  # at the end of a run, once
                here = torch.nonzero(row == r)[:, 0]
                values, order = torch.cat([best[r], nearness[here]]).topk(EACH)
                domains = torch.cat([is_target[r], torch.full((len(here),), role == "target")])
                if image:
                    best_x[r] = torch.cat([best_x[r], x[here.to(x.device)].float().cpu()])[order]
                best[r], is_target[r] = values, domains[order]
    return {"source": source, "target": target, "weight": best, "x": best_x, "is_target": is_target}


def write_at_the_end(plugin: MemSPM, model: uda.UDA) -> Path | None:
    """Write ``memory/subprototypes.png`` and ``.json`` in the last validation of a fit; the rank 0 writes its share."""
    trainer = model._trainer
    if trainer is None or trainer.state.fn != "fit" or trainer.sanity_checking or getattr(trainer, "fast_dev_run", 0):
        return None
    if batches_done(trainer) < total_batches(model) or not trainer.is_global_zero or not has_run_directory(trainer):
        return None
    found = held(plugin, model)
    folder = Path(trainer.default_root_dir) / "memory"
    folder.mkdir(parents=True, exist_ok=True)
    names = list(model.class_names or map(str, range(model.num_classes)))
    table = [
        {
            "item": r // plugin.subs, "sub": r % plugin.subs, "target": int(found["target"][r]),
            "source": {names[c]: int(n) for c, n in enumerate(found["source"][r].tolist()) if n},
        }
        for r in used_rows(found).tolist()
    ]  # fmt: skip
    (folder / "subprototypes.json").write_text(json.dumps(table, indent=1))
    draw(found, plugin.subs, names, folder / "subprototypes.png")
    return folder


def has_run_directory(trainer: Any) -> bool:
    """Whether the run is one of ``uda fit``, which keeps its config in its directory."""
    return (Path(trainer.default_root_dir) / "config.yaml").exists()


def used_rows(found: dict[str, Any]) -> Tensor:
    """Sub-prototypes that hold a sample, those that hold most first."""
    count = found["source"].sum(1) + found["target"]
    order = count.argsort(descending=True)
    return order[count[order] > 0]


def draw(found: dict[str, Any], subs: int, names: list[str], path: Path) -> None:
    """The sub-prototypes that hold most: their nearest samples where there are images, and the classes they hold."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(used_rows(found)[:MOST].tolist())
    pictures = found["x"]
    wide = EACH if pictures is not None else 0
    figure = Figure(figsize=(3.2 + 0.6 * wide, 0.6 + 0.5 * max(len(rows), 1)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(max(len(rows), 1), wide + 4)
    axes = figure.add_subplot(grid[:, wide:])
    left = torch.zeros(len(rows))
    for c in range(len(names) + 1):
        values = found["source"][rows, c] if c < len(names) else found["target"][rows]
        label, colour = (names[c], None) if c < len(names) else ("target (no labels)", "lightgrey")
        axes.barh(range(len(rows)), values, left=left, label=label, color=colour)
        left = left + values
    axes.set_yticks(range(len(rows)), [f"{r // subs}.{r % subs}" for r in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("samples held (source by class)", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, loc="lower right")
    figure.suptitle("item.sub-prototype; the most used, source blue and target orange frames" if wide else
                    "item.sub-prototype; the most used", fontsize=8)  # fmt: skip
    for i, r in enumerate(rows if wide else ()):
        for j in range(EACH):
            if found["weight"][r, j] > -2:
                cell = figure.add_subplot(grid[i, j])
                x = pictures[r, j]
                x = (x - x.min()) / (x.max() - x.min()).clamp_min(1e-6)
                cell.imshow(x.permute(1, 2, 0).expand(-1, -1, 3), interpolation="nearest")
                cell.set_xticks([])
                cell.set_yticks([])
                for side in cell.spines.values():
                    side.set(color="tab:orange" if found["is_target"][r, j] else "tab:blue", linewidth=1.5)
    figure.savefig(path)
