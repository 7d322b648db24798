"""Accuracy by the number of labels that LFTL may ask for, against samples drawn at random: docs/methods/sourcefree.md.

    python tests/benchmarks/lftl_budget.py LEDGER.jsonl [--runs DIR] [--seeds 0 1 2] [--sampling random contrastive]
    python tests/benchmarks/lftl_budget.py LEDGER.jsonl --table

PACS features, two tasks. A model is trained on the source; each run starts from it and sees the target, in the ten
rounds that are published, each of an epoch, with the rate from its start. The oracle is simulated: a file of labels, of
which LFTL gets the queried ones. Accuracy is given over samples that were not queried (`rest`), and over all (`all`, as
published, which counts the queried ones too). What the ledger has is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import uda
from uda.cli import main as command

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data")) / "pacs_efficientnet_lite0.npz"
TASKS = [("art_painting", "cartoon"), ("photo", "art_painting")]
BUDGETS = (0.01, 0.05, 0.1)
SAMPLING = ("random", "contrastive", "margin", "entropy", "badge", "clue", "k_centre")
ROUNDS = 10
CLASSES = np.load(FILE)["classes"].tolist()
WORDS = [
    f"--data.reader.init_args.path={FILE}", "--model.head=weight_norm", "--model.label_smoothing=0.1",
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--select_by=im",
    "--trainer.check_val_every_n_epoch=10",
]  # fmt: skip
BASE = ["--config", str(ROOT / "configs" / "pacs_features_source_only.yaml"), *WORDS]
OVERLAY = str(ROOT / "configs" / "methods" / "active" / "lftl.yaml")


def fit(words: list[str], folder: Path) -> Path:
    """One ``uda fit``; its last checkpoint."""
    if code := command(["fit", *words, f"--run_dir={folder}"]):
        raise SystemExit(f"uda fit ended with {code}: {' '.join(words)}")
    return folder / "checkpoints" / "last.ckpt"


def accuracies(checkpoint: Path, x: np.ndarray, y: np.ndarray) -> tuple[float, float, int]:
    """Accuracy over the samples that were not queried, over all, and the number of queried ones."""
    model = uda.UDA.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    names = [CLASSES.index(c) for c in model.class_names]
    with torch.no_grad():
        label = np.array(names)[model(torch.tensor(x, dtype=torch.float32)).argmax(1).numpy()]
    right, rest = label == y, np.ones(len(y), bool)
    if "refine" in model.plugins:
        rest[model.plugins["refine"].chosen.numpy()] = False
    return float(right[rest].mean()), float(right.mean()), int((~rest).sum())


def table(lines: list[dict]) -> str:
    """Mean over tasks and seeds by budget and sampling."""
    frame = pd.DataFrame(lines)
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
            base = [*BASE, f"--seed_everything={seed}", f"--data.target={target}"]
            start = place / "source" / "checkpoints" / "last.ckpt"
            if not start.exists():
                fit([*base, f"--data.source={source}"], place / "source")
            with (place / "labels.csv").open("w", newline="") as out:
                csv.writer(out).writerows([("id", "label"), *((f"{target}/{i}", CLASSES[c]) for i, c in enumerate(y))])
            oracle = {"class_path": "SimulatedOracle", "init_args": {"labels": str(place / "labels.csv")}}
            for budget, how in wanted:
                key = f"{source}/{target}/{budget}/{how}/{seed}"
                if key in done:
                    continue
                last = start
                if budget:
                    last = fit([
                        *base, "--config", OVERLAY, "--data.source=null", f"--model.init_from={start}",
                        f"--model.plugins.refine.init_args.budget={budget}",
                        f"--model.plugins.refine.init_args.rounds={ROUNDS}",
                        f"--model.schedule.init_args.times={ROUNDS}",
                        f"--model.plugins.refine.init_args.sampling={how}",
                        f"--model.plugins.refine.init_args.oracle={json.dumps(oracle)}",
                    ], place / f"{how}{budget}")  # fmt: skip
                rest, total, asked = accuracies(last, x, y)
                line = {"key": key, "task": f"{source}->{target}", "budget": budget, "sampling": how, "seed": seed}
                with args.ledger.open("a") as out:
                    out.write(json.dumps({**line, "rest": rest, "all": total, "queried": asked}) + "\n")


if __name__ == "__main__":
    main()
