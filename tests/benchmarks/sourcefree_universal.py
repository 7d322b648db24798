"""GLC and LEAD in the universal setting on PACS features, from source models alone: docs/methods/sourcefree.md.

    python tests/benchmarks/sourcefree_universal.py LEDGER.jsonl [--runs DIR] [--seeds 0 1 2]
    python tests/benchmarks/sourcefree_universal.py LEDGER.jsonl --table

The split and the six tasks of configs/bench/universal.yaml: 3 classes in both domains, 2 in the source alone, 2 in the
target alone. A model is trained on the source (weight-normalised classifier, label smoothing 0.1); `source_only` is
this model with rejection by entropy (`reject`), `shot` is SHOT with the same. What the ledger has is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import pandas as pd

from uda.cli import main as command

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data")) / "pacs_efficientnet_lite0.npz"
DOMAINS = ("art_painting", "cartoon", "photo")
BASE = [
    "--config", str(ROOT / "configs" / "pacs_features_source_only.yaml"), f"--data.reader.init_args.path={FILE}",
    "--model.head=weight_norm", "--model.label_smoothing=0.1", "--data.setting=universal",
    "--data.classes={known: 3, source_private: 2, target_private: 2}", "--data.any_method=true",
    "--trainer.logger=false", "--trainer.enable_progress_bar=false", "--select_by=im",
    "--trainer.check_val_every_n_epoch=10",
]  # fmt: skip
METHODS = {"source_only": ["reject"], "shot": ["shot", "reject"], "glc": ["glc"], "lead": ["lead"]}
MEASURES = ("h_score", "os_star", "unk", "auroc")


def fit(words: list[str], folder: Path) -> dict:
    """One ``uda fit``; its summary."""
    if code := command(["fit", *words, f"--run_dir={folder}"]):
        raise SystemExit(f"uda fit ended with {code}: {' '.join(words)}")
    return json.loads((folder / "summary.json").read_text())


def table(lines: list[dict]) -> str:
    """Mean over tasks of the last epoch, by method; H-score by seed."""
    frame = pd.DataFrame(lines)
    rows = ["| method | H-score | by seed | OS* | UNK | AUROC |", "|---|---|---|---|---|---|"]
    for method, part in frame.groupby("method", sort=False):
        mean = {m: 100 * part[m].mean() for m in MEASURES}
        by = ", ".join(f"{100 * v:.1f}" for v in part.groupby("seed")["h_score"].mean())
        rest = " | ".join(f"{mean[m]:.1f}" for m in MEASURES[1:])
        rows.append(f"| {method} | {mean['h_score']:.1f} | {by} | {rest} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--table", action="store_true", help="print the table of the ledger")
    args = parser.parse_args()
    lines = [json.loads(line) for line in args.ledger.read_text().splitlines()] if args.ledger.exists() else []
    if args.table:
        print(table(lines))
        return
    done, folder = {line["key"] for line in lines}, args.runs or Path(tempfile.mkdtemp())
    for seed in args.seeds:
        for source, target in ((s, t) for s in DOMAINS for t in DOMAINS if s != t):
            base = [*BASE, f"--seed_everything={seed}", f"--data.target={target}"]
            place = folder / f"{source}-{target}-{seed}"
            for method in ("source_only", *(m for m in args.methods if m != "source_only")):
                key = f"{source}->{target}/{method}/{seed}"
                ready = (place / "source_only" / "summary.json").exists()
                if key in done or (method == "source_only" and ready):
                    continue
                overlays = [str(ROOT / "configs" / "methods" / f"{m}.yaml") for m in METHODS[method]]
                words = [w for overlay in overlays for w in ("--config", overlay)]
                if method == "source_only":
                    words += [f"--data.source={source}"]
                else:
                    start = place / "source_only" / "checkpoints" / "last.ckpt"
                    words += ["--data.source=null", f"--model.init_from={start}"]
                summary = fit([*base, *words], place / method)
                found = {m: summary[m]["last"] for m in MEASURES}
                line = {"key": key, "task": f"{source}->{target}", "method": method, "seed": seed, **found}
                with args.ledger.open("a") as out:
                    out.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
