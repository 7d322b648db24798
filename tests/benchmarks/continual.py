"""Sequences of domains by `uda continual`: the ledger of docs/benchmarks/continual.md.

    python tests/benchmarks/continual.py LEDGER.jsonl [--cache DIR] [--minutes 6] [--suites ...] [--methods ...]

Each sequence is one `uda continual` in a folder of the cache; an interrupted one goes on. After ``--minutes`` the
script stops between two sequences with exit code 75, to be started again. Data are read from ``UDA_SHARED_DATA`` or
``../shared/data``. `uda bench table LEDGER.jsonl` makes the tables.

A task of the ledger is a measure (TDA, TDG, FA) of a sequence; ``source_only`` is stage 0 of the sequence of SHOT.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ledgers import keys_of, stopper
from uda_testtime.continual.measures import sequence_measures

from uda.cli import main as uda
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = ROOT / "configs"
PACS = ["art_painting", "cartoon", "photo"]
#: Words of the fits, and the orders of the domains, source first.
SUITES: dict[str, tuple[list[str], list[list[str]]]] = {
    "pacs": (
        ["--config", str(CONFIGS / "pacs_features_source_only.yaml"),
         f"--data.reader.init_args.path={DATA / 'pacs_efficientnet_lite0.npz'}",
         "--trainer.check_val_every_n_epoch=10"],
        [PACS, PACS[1:] + PACS[:1], PACS[2:] + PACS[:2]],
    ),
    "digits": (
        ["--config", str(CONFIGS / "mnist_usps_source_only.yaml"),
         f"--data.reader.init_args.path={DATA / 'digits.npz'}", "--data.views.init_args.channels=3",
         "--model.backbone.init_args.in_channels=3", "--model.backbone.init_args.widths=[16,32,64]",
         "--model.bottleneck=128", "--data.batch_size=32", "--data.epoch_steps=100", "--trainer.max_epochs=8",
         "--trainer.check_val_every_n_epoch=8"],
        [["mnist_train", "mnistm_train", "usps_train"]],
    ),
}  # fmt: skip
SHOT = ["--config", str(CONFIGS / "methods" / "shot.yaml")]
CODAG = [*SHOT, "--generalise", str(CONFIGS / "methods" / "codag.yaml")]
METHODS: dict[str, list[str]] = {
    "shot": SHOT,
    "dann": ["--config", str(CONFIGS / "methods" / "dann.yaml")],
    "codag": CODAG,
}


def short(order: list[str]) -> str:
    """``art_p-carto-photo``."""
    return "-".join(name.removesuffix("_train")[:5] for name in order)


def records(suite: str, order: list[str], method: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """A record a measure, of a sequence that is over; of SHOT's also those of the source model."""
    summary = json.loads((folder / "summary.json").read_text())
    seconds = sum(json.loads(f.read_text())["seconds"] for f in folder.glob("*/*/summary.json"))
    rows, shifts = summary["oracle_accuracies"], summary["shifts"]
    found = {method: rows} | ({"source_only": [rows[0]] * len(rows)} if method == "shot" else {})
    out = []
    for name, matrix in found.items():
        for measure, value in sequence_measures(matrix, shifts, "source")["mean"].items():
            if measure == "all":
                continue
            task = f"{short(order)} {measure.upper()}"
            out.append({
                "suite": suite, "task": task, "method": name, "seed": seed, "key": f"{suite}/{task}/{name}/{seed}",
                "status": "finished", "select_by": None, "scores": {}, "seconds": round(seconds, 3),
                "metrics": {next(iter(MEASURES)): {"last": round(value, 6)}}, "accuracies": matrix,
                "adapted": summary["oracle_adapted"] if name == method else None,
            })  # fmt: skip
    return out


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_continual_benchmark")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two sequences after so long")
    parser.add_argument("--suites", nargs="+", default=["pacs"], choices=list(SUITES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--orders", type=int, nargs="+", default=[0, 1, 2], help="of the suite, by number")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop_in_time = stopper(args.minutes)
    done = keys_of(args.ledger)
    for suite in args.suites:
        words, orders = SUITES[suite]
        chosen = [order for i, order in enumerate(orders) if i in args.orders]
        for order, seed, method in ((o, s, m) for o in chosen for s in args.seeds for m in args.methods):
            if f"{suite}/{short(order)} TDA/{method}/{seed}" in done:
                continue
            folder = args.cache / suite / short(order) / f"{method}_{seed}"
            if not (folder / "summary.json").is_file():
                stop_in_time()
                code = uda([
                    "continual", *words, *METHODS[method], "--shifts", *order[1:], f"--data.source={order[0]}",
                    f"--data.target={order[1]}", f"--seed_everything={seed}", "--trainer.enable_progress_bar=false",
                    "--trainer.logger=false", "--output", str(folder), "--in_process",
                    *(["--resume"] if (folder / "continual.json").is_file() else []),
                ])  # fmt: skip
                if code:
                    sys.exit(code)
            with args.ledger.open("a") as out:
                out.writelines(
                    json.dumps(r) + "\n" for r in records(suite, order, method, seed, folder) if r["key"] not in done
                )


if __name__ == "__main__":
    main()
