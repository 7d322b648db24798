"""`uda fit` and `uda adapt` along the usual corruptions, as a user calls them: records of docs/benchmarks/testtime.md.

    python tests/benchmarks/testtime_cifar10c.py LEDGER.jsonl [--cache DIR] [--minutes 6] [--methods ...]

The source model is that of configs/cifar10_source.yaml, the stream that of configs/cifar10c_tent.yaml: the other half
of the images in 15 corruptions one after the other, severity 5, batches of 200. A walk that was interrupted goes on.
After ``--minutes`` the script stops between two of these with exit code 75, to be started again. Data are read from
``UDA_SHARED_DATA`` or ``../shared/data``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from ledgers import keys_of, stopper

from uda.cli import main as uda
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
CONFIGS = ROOT / "configs"
READ = f"--data.reader.reader.path={DATA}/{{domain}}.npz"
#: What is laid over configs/cifar10c_tent.yaml.
METHODS: dict[str, list[str]] = {
    "source": ["--model.plugins.adapt.method=Source", "--model.plugins.adapt.arguments={}"],
    "tent": [],
    **{name: ["--config", str(CONFIGS / "methods" / f"{name}.yaml")] for name in ("bn_statistics", "sar", "lame")},
}


def called(words: list[str], folder: Path, begun: str, resume: list[str]) -> None:
    """A command whose results go to a folder; it goes on where it was interrupted."""
    if code := uda([*words, *(resume if (folder / begun).is_file() else [])]):
        sys.exit(code)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_cifar10c")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two commands after so long")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    stop_in_time = stopper(args.minutes)
    done, run = keys_of(args.ledger), args.cache / "source"
    if not (run / "summary.json").is_file():
        words = ["fit", "--config", str(CONFIGS / "cifar10_source.yaml"), READ, "--run_dir", str(run)]
        called([*words, "--trainer.enable_progress_bar=false"], run, "run.json", ["--ckpt_path", "last"])
    for method in args.methods:
        if (key := f"cifar10c/continual/200/{method}/0") in done:
            continue
        stop_in_time()
        out = run / "adapt" / method
        words = [
            "adapt", "--config", str(CONFIGS / "cifar10c_tent.yaml"), *METHODS[method], READ, "--output", str(out),
            f"--model.init_from={run / 'checkpoints' / 'last.ckpt'}", "--cache", str(args.cache / "images"),
        ]  # fmt: skip
        called(words, out, "state.pt", ["--resume"])
        figures = json.loads((out / "stream.json").read_text())
        with args.ledger.open("a") as ledger:
            ledger.write(json.dumps({
                "suite": "cifar10c", "task": "cifar10c continual 200", "method": method, "seed": 0, "key": key,
                "status": "finished", "select_by": None, "scores": {},
                "metrics": {next(iter(MEASURES)): {"last": round(1 - figures["oracle_shift_mean_error"] / 100, 6)}},
                "updates": figures["updates"], "samples": figures["samples"],
                "by_shift": {k: round(1 - v / 100, 4) for k, v in figures["oracle_error_by_shift"].items()},
            }) + "\n")  # fmt: skip


if __name__ == "__main__":
    main()
