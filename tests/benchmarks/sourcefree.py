"""The two steps of source-free adaptation on real features: the ledger of docs/benchmarks/sourcefree.md.

    python tests/benchmarks/sourcefree.py LEDGER.jsonl [--runs DIR] [--seeds 0 1 2] [--methods ...] [--suites ...]

For each task and seed a model is trained on the source (weight-normalised classifier, label smoothing 0.1); each method
then starts from its checkpoint and sees the target alone. What the ledger has is not made again. Data are read from
``UDA_SHARED_DATA`` or ``../shared/data``. `uda bench table LEDGER.jsonl` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from ledgers import keys_of

from uda.bench.record import without_nulls
from uda.cli import main as uda
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
PACS = {"A": "art_painting", "C": "cartoon", "P": "photo"}
SURF = {"A": "A", "C": "C", "D": "D"}
SUITES = {
    "pacs_features": ("pacs_efficientnet_lite0.npz", PACS),
    "office_caltech": ("office_caltech10.npz", SURF),
}
METHODS = ("shot", "nrc", "aad", "notela", "colearn", "shot_plus")
OPTIONS = {"shot_plus": ["--model.plugins.refine.init_args.rotation=0"]}  # features cannot be turned
SOURCE = ["--model.head=weight_norm", "--model.label_smoothing=0.1"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--select_by=im"]


def run(words: list[str], folder: Path) -> dict:
    """One ``uda fit``; its summary."""
    code = uda(["fit", *words, *QUIET, f"--run_dir={folder}"])
    if code:
        raise SystemExit(f"uda fit ended with {code}: {' '.join(words)}")
    return json.loads((folder / "summary.json").read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    args = parser.parse_args()
    done = keys_of(args.ledger)
    folder = args.runs or Path(tempfile.mkdtemp())
    for seed in args.seeds:
        for suite in args.suites:
            file, domains = SUITES[suite]
            for s, t in ((s, t) for s in domains for t in domains if s != t):
                task = f"{s}->{t}"
                base = [
                    "--config", str(ROOT / "configs" / f"{suite}_source_only.yaml"), f"--seed_everything={seed}",
                    f"--data.reader.init_args.path={DATA / file}", f"--data.target={domains[t]}", *SOURCE,
                ]  # fmt: skip
                source = folder / suite / task.replace(">", "") / f"source{seed}"
                for method in ("source_only", *args.methods):
                    key = f"{suite}/{task}/{method}/{seed}"
                    if key in done:
                        continue
                    if not (source / "summary.json").exists():
                        run([*base, f"--data.source={domains[s]}"], source)
                    if method == "source_only":
                        summary = json.loads((source / "summary.json").read_text())
                    else:
                        overlay = str(ROOT / "configs" / "methods" / f"{method}.yaml")
                        summary = run([
                            *base, "--config", overlay, "--data.source=null", *OPTIONS.get(method, []),
                            f"--model.init_from={source / 'checkpoints' / 'last.ckpt'}",
                        ], source.with_name(f"{method}{seed}"))  # fmt: skip
                    metrics = {m: summary[m] for m in ("source_accuracy", *MEASURES) if m in summary}
                    record = {
                        "suite": suite, "task": f"{suite} {task}", "method": method, "seed": seed, "key": key,
                        "status": "finished", "select_by": "im", "metrics": metrics, "scores": {},
                    }  # fmt: skip
                    record |= {k: summary[k] for k in ("seconds", "peak_memory_mib", "versions", "plugins")}
                    with args.ledger.open("a") as out:
                        out.write(json.dumps(without_nulls(record)) + "\n")


if __name__ == "__main__":
    main()
