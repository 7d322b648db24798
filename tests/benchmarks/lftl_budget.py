"""Accuracy by the number of labels that LFTL may ask for, against samples drawn at random: docs/methods/sourcefree.md.

    python tests/benchmarks/lftl_budget.py LEDGER.jsonl [--runs DIR] [--seeds 0 1 2] [--sampling random contrastive]
    python tests/benchmarks/lftl_budget.py LEDGER.jsonl --table

PACS features, two tasks. A model is trained on the source; each run starts from it and sees the target, in the ten
rounds and batches of 64 that are published, each round of 20 steps with the rate from its start. The oracle is
simulated: a file of labels, of which LFTL gets the queried ones. Accuracy is given over samples that were not queried
(`rest`), and over all (`all`, as published, which counts the queried ones too). What the ledger has is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
from uda_sourcefree import LFTL
from uda_sourcefree.oracle import SimulatedOracle

import uda
from uda.cli import main as command
from uda.optim import InverseDecay, Restarts

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data")) / "pacs_efficientnet_lite0.npz"
TASKS = [("art_painting", "cartoon"), ("photo", "art_painting")]
BUDGETS = (0.01, 0.05, 0.1)
SAMPLING = ("random", "contrastive", "margin", "entropy", "badge", "clue", "k_centre")
ROUNDS, STEPS, BATCH = 10, 20, 64
CLASSES = np.load(FILE)["classes"].tolist()
QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False, "num_sanity_val_steps": 0, "limit_val_batches": 0,
}  # fmt: skip


def source_model(source: str, target: str, seed: int, folder: Path) -> Path:
    """Checkpoint of a model of the source, trained by its config."""
    last = folder / "checkpoints" / "last.ckpt"
    if not last.exists():
        code = command([
            "fit", "--config", str(ROOT / "configs" / "pacs_features_source_only.yaml"),
            f"--data.reader.init_args.path={FILE}", "--model.head=weight_norm", "--model.label_smoothing=0.1",
            f"--seed_everything={seed}", f"--data.source={source}", f"--data.target={target}", "--trainer.logger=false",
            "--trainer.enable_progress_bar=false", "--select_by=im", "--trainer.check_val_every_n_epoch=10",
            f"--run_dir={folder}",
        ])  # fmt: skip
        if code:
            raise SystemExit(f"uda fit ended with {code}")
    return last


def adapted(start: Path, target: str, seed: int, budget: float, how: str, labels: Path) -> uda.UDA:
    """The model after LFTL."""
    L.seed_everything(seed, verbose=False)
    reader = uda.data.Arrays(str(FILE), kind="features")
    data = uda.DataModule(reader, None, target, batch_size=BATCH, epoch_steps=STEPS, seed=seed)
    plugin = LFTL(budget, SimulatedOracle(str(labels)), rounds=ROUNDS, sampling=how)
    model = uda.UDA(
        "identity", {"refine": plugin}, bottleneck=256, head="weight_norm", label_smoothing=0.1,
        schedule=Restarts(InverseDecay(), ROUNDS), init_from=str(start), scores=[],
    )  # fmt: skip
    L.Trainer(max_epochs=ROUNDS, **QUIET).fit(model, data)
    return model


def accuracies(model: uda.UDA, x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """Accuracy over the samples that were not queried, over all, and the number of queried ones."""
    names = np.array([CLASSES.index(c) for c in model.class_names])
    with torch.no_grad():
        label = names[model.eval()(torch.tensor(x, dtype=torch.float32)).argmax(1).numpy()]
    right, rest = label == y, np.ones(len(y), bool)
    if "refine" in model.plugins:
        rest[model.plugins["refine"].chosen.numpy()] = False
    return float(right[rest].mean()), float(right.mean()), int((~rest).sum())


def table(lines: list[dict]) -> str:
    """Mean over tasks and seeds by budget and sampling."""
    frame = pd.DataFrame(sorted(lines, key=lambda line: (line["budget"], ("none", *SAMPLING).index(line["sampling"]))))
    frame["n"] = frame["budget"].map(lambda b: f"{100 * b:g} %")
    rows = ["| labels | sampling | accuracy (rest) | by seed | accuracy (all) |", "|---|---|---|---|---|"]
    for (_, n, how), part in frame.groupby(["budget", "n", "sampling"], sort=False):
        seeds = part.groupby("seed")["rest"].mean()
        by = ", ".join(f"{100 * v:.1f}" for v in seeds)
        rows.append(f"| {n} | {how} | {100 * part['rest'].mean():.1f} | {by} | {100 * part['all'].mean():.1f} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tasks", type=int, nargs="+", default=list(range(len(TASKS))), help="by number, above")
    parser.add_argument("--sampling", nargs="+", default=SAMPLING, choices=SAMPLING)
    parser.add_argument("--table", action="store_true", help="print the table of the ledger")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.ledger.read_text().splitlines()] if args.ledger.exists() else []
    if args.table:
        print(table(lines))
        return
    done, folder, file = {line["key"] for line in lines}, args.runs or Path(tempfile.mkdtemp()), np.load(FILE)
    for seed in args.seeds:
        for source, target in (TASKS[i] for i in args.tasks):
            x, y, place = file[f"{target}_x"], file[f"{target}_y"], folder / f"{source}-{target}-{seed}"
            wanted = [(0.0, "none"), *((b, s) for b in BUDGETS for s in args.sampling)]
            if all(f"{source}/{target}/{b}/{s}/{seed}" in done for b, s in wanted):
                continue
            start = source_model(source, target, seed, place / "source")
            with (place / "labels.csv").open("w", newline="") as out:
                csv.writer(out).writerows([("id", "label"), *((f"{target}/{i}", CLASSES[c]) for i, c in enumerate(y))])
            for budget, how in wanted:
                key = f"{source}/{target}/{budget}/{how}/{seed}"
                if key in done:
                    continue
                if budget:
                    model = adapted(start, target, seed, budget, how, place / "labels.csv")
                else:
                    model = uda.UDA.load_from_checkpoint(start, map_location="cpu")
                rest, total, asked = accuracies(model, x, y)
                line = {"key": key, "task": f"{source}->{target}", "budget": budget, "sampling": how, "seed": seed}
                with args.ledger.open("a") as out:
                    out.write(json.dumps({**line, "rest": rest, "all": total, "queried": asked}) + "\n")


if __name__ == "__main__":
    main()
