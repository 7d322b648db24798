"""Several source models, and the best single source: lines of docs/benchmarks/multisource.jsonl that no suite makes.

    python tests/benchmarks/multisource.py LEDGER.jsonl [--runs DIR] [--seeds 0 1 2]

For each source and seed a model is trained (weight-normalised classifier, label smoothing 0.1). For each task, the
multi-source-free methods start from the checkpoints of its two sources and see the target alone. ``best_single_oracle``
is the run of the better of the two sources, taken over whole from the ledger of the single-source suite; which one is
better is chosen by target labels, on the mean over seeds. What the ledger has is not made again. Data are read from
``UDA_SHARED_DATA`` or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from uda.bench.record import without_nulls
from uda.cli import main as uda
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
SETS = {
    "pacs_features": ("PACS", "pacs_efficientnet_lite0.npz", {"A": "art_painting", "C": "cartoon", "P": "photo"}),
    "office_caltech": ("SURF", "office_caltech10.npz", {"A": "A", "C": "C", "D": "D"}),
    "amazon": ("Amazon", "amazon_minilm.npz", {"B": "books", "D": "dvd", "K": "kitchen"}),
}
METHODS = ("decision", "caida", "msfda", "smuda")
SOURCE = ["--model.head=weight_norm", "--model.label_smoothing=0.1"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--select_by=im"]


def run(words: list[str], folder: Path) -> dict:
    """One ``uda fit``; its summary."""
    code = uda(["fit", *words, *QUIET, f"--run_dir={folder}"])
    if code:
        raise SystemExit(f"uda fit ended with {code}: {' '.join(words)}")
    return json.loads((folder / "summary.json").read_text())


def best_single(suite: str, sources: list[str], target: str, seeds: list[int]) -> dict[int, dict]:
    """Lines by seed of the better source, from the ledger of the single-source suite."""
    lines: dict[tuple[str, int], dict] = {}
    for text in (ROOT / "docs" / "benchmarks" / f"{suite}.jsonl").read_text().splitlines():
        line = json.loads(text)
        if line["method"] == "source_only" and line["status"] == "finished":
            lines[line["task"], line["seed"]] = line

    def mean(source: str) -> float:
        found = [lines[f"{source}->{target}", s]["metrics"]["target_accuracy"]["last"] for s in seeds]
        return sum(found) / len(found)

    best = max(sources, key=mean)
    return {s: lines[f"{best}->{target}", s] for s in seeds}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--runs", type=Path, default=None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    done = {json.loads(x)["key"] for x in args.ledger.read_text().splitlines()} if args.ledger.exists() else set()
    folder = args.runs or Path(tempfile.mkdtemp())

    def write(record: dict) -> None:
        with args.ledger.open("a") as out:
            out.write(json.dumps(without_nulls(record)) + "\n")

    for seed in args.seeds:
        for suite, (title, file, domains) in SETS.items():
            base = [
                "--config", str(ROOT / "configs" / f"{suite}_source_only.yaml"), f"--seed_everything={seed}",
                f"--data.reader.init_args.path={DATA / file}", *SOURCE,
            ]  # fmt: skip
            for t, target in domains.items():
                names = [s for s in domains if s != t]
                task = f"{title} {'+'.join(names)}->{t}"
                here = {"suite": "multisource", "task": task, "seed": seed}
                key = f"multisource/{task}/best_single_oracle/{seed}"
                if key not in done:
                    line = best_single(suite, names, t, args.seeds)[seed]
                    write({**line, **here, "method": "best_single_oracle", "key": key})
                for method in METHODS:
                    key = f"multisource/{task}/{method}/{seed}"
                    if key in done:
                        continue
                    checkpoints = []
                    for s in names:
                        source = folder / suite / f"{s}{seed}"
                        if not (source / "summary.json").exists():  # the target is only measured on: any will do
                            run([*base, f"--data.source={domains[s]}", f"--data.target={target}"], source)
                        checkpoint, file = str(source / "checkpoints" / "last.ckpt"), source / "handover.pt"
                        if method == "smuda":  # a class of DSLR has eight samples
                            if not file.exists() and uda(["export-source", checkpoint, "--statistics", "--least=5",
                                                          f"--output={file}"]):  # fmt: skip
                                raise SystemExit("uda export-source failed")
                            checkpoint = str(file)
                        checkpoints.append(checkpoint)
                    overlay = str(ROOT / "configs" / "methods" / "from_checkpoints" / f"{method}.yaml")
                    summary = run([
                        *base, "--config", overlay, "--data.source=null", f"--data.target={target}",
                        f"--model.plugins.refine.checkpoints={json.dumps(checkpoints)}",
                    ], folder / suite / f"{'+'.join(names)}-{t}-{method}{seed}")  # fmt: skip
                    metrics = {m: summary[m] for m in ("source_accuracy", *MEASURES) if m in summary}
                    record = {
                        **here, "method": method, "key": key, "status": "finished", "select_by": "im",
                        "metrics": metrics, "scores": {},
                    }  # fmt: skip
                    write(record | {k: summary[k] for k in ("seconds", "peak_memory_mib", "versions", "plugins")})


if __name__ == "__main__":
    main()
