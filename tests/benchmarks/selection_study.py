"""How well label-free scores choose epochs and runs: ``python tests/benchmarks/selection_study.py OUT``.

Trains source only, DANN + MCC and CDAN + MCC on digits through ``uda fit`` (runs that are in OUT already are
read, not trained again), then prints a Markdown table. Target labels serve here to judge the scores only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from scipy.stats import spearmanr

from uda.selection import SCORES, VOTERS, select_epoch, vote

#: all that a run is made with, here and not in configs/, so that the figures stay what they were measured on
BASE = {
    "model": {
        "backbone": "small_cnn",
        "bottleneck": 128,
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.001},
        },
        "scores": list(SCORES),
    },
    "data": {
        "reader": {"class_path": "Digits"}, "source": "rendered", "target": "handwritten", "batch_size": 64,
        "epoch_steps": 40, "source_val_fraction": 0.1,
    },
    "trainer": {"max_epochs": 15, "accelerator": "cpu", "enable_progress_bar": False},
}  # fmt: skip
METHODS = {
    "source_only": {},
    "dann_mcc": {"align": {"class_path": "DANN"}, "refine": {"class_path": "MCC"}},
    "cdan_mcc": {"align": {"class_path": "CDAN"}, "refine": {"class_path": "MCC"}},
}
ORACLE = "oracle/target_accuracy"
Rows = list[dict[str, float]]


def history(run: Path, plugins: dict[str, dict], seed: int) -> Rows:
    """Figures of each validation of a run, trained if need be.

    Raises:
        RuntimeError: a run that is there, but was made with other settings.
    """
    last, config = run / "checkpoints" / "last.ckpt", run.with_suffix(".yaml")
    text = yaml.safe_dump({**BASE, "seed_everything": seed, "model": {**BASE["model"], "plugins": plugins}})
    if not (run / "summary.json").is_file():  # written when a run has come to its end
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(text)
        command = [sys.executable, "-m", "uda.cli", "fit", "--config", str(config), f"--run_dir={run}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=env, stdout=sys.stderr)
    elif config.read_text() != text:
        raise RuntimeError(f"{run} was made with other settings: give another folder.")
    callbacks = torch.load(last, map_location="cpu", weights_only=True)["callbacks"]
    return next(state["history"] for name, state in callbacks.items() if name.startswith("RunSummary"))


def values(rows: Rows, name: str) -> np.ndarray:
    """A score, or the vote, of each row; larger is better."""
    if name == "vote":
        return vote({n: [r[f"select/{n}"] for r in rows] for n in VOTERS})
    return np.array([r[f"select/{name}"] for r in rows])


def oracle(rows: Rows) -> np.ndarray:
    """Target accuracy of each row."""
    return np.array([r[ORACLE] for r in rows])


def correlation(rows: Rows, name: str) -> float:
    """Spearman's rank correlation with the target accuracy; NaN where one side is constant."""
    x, y = values(rows, name), oracle(rows)
    return float(spearmanr(x, y).statistic) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")


def lost_epoch(rows: Rows, name: str) -> float:
    """Points of accuracy between the best epoch and the one that a score takes (or the last)."""
    found = select_epoch(rows, name)
    return 100 * (max(oracle(rows)) - rows[-1 if found is None else found][ORACLE])


def lost_run(last: Rows, name: str) -> float:
    """Points of accuracy between the best run and the one that a score takes, by their last epochs."""
    return 100 * (max(oracle(last)) - oracle(last)[int(np.argmax(values(last, name)))])


def table(runs: dict[str, Rows]) -> str:
    """A line for each score: rank correlations, and accuracy lost by selecting with it."""
    pooled, last = [row for rows in runs.values() for row in rows], [rows[-1] for rows in runs.values()]
    out = [
        "| score | rho in a run | rho of runs | rho of all | lost, epoch | lost, run |",
        "|---|---|---|---|---|---|",
    ]
    for name in [*SCORES, "vote"]:
        within = np.nanmean([correlation(rows, name) for rows in runs.values()])
        lost = np.mean([lost_epoch(rows, name) for rows in runs.values()])
        cells = [within, correlation(last, name), correlation(pooled, name), lost, lost_run(last, name)]
        out.append(f"| {name} | " + " | ".join(f"{c:.2f}" for c in cells) + " |")
    lost = 100 * np.mean([max(oracle(rows)) - rows[-1][ORACLE] for rows in runs.values()])
    out.append(f"| last epoch | | | | {lost:.2f} | |")
    return "\n".join(out)


def main() -> None:
    """Train or read all runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for method, plugins in METHODS.items():
        for seed in range(given.seeds):
            name = f"{method}_{seed}"
            runs[name] = history(given.out.absolute() / name, plugins, seed)
            print(
                f"{name}: last {runs[name][-1][ORACLE]:.4f}, best {max(oracle(runs[name])):.4f}, collapsed "
                f"{sum(r['select/collapsed'] for r in runs[name]):.0f} of {len(runs[name])}",
                file=sys.stderr,
            )
    print(table(runs))


if __name__ == "__main__":
    main()
