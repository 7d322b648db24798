"""Test-time methods that need several source domains: the ledger behind docs/benchmarks/testtime_sources.md.

    python tests/benchmarks/testtime_sources.py LEDGER.jsonl [--cache DIR] [--minutes 6] [--seeds 0 1 2]

Each domain of PACS (frozen features) in turn is the stream, the other two are the sources of a model by `uda fit`.
After ``--minutes`` the script stops between two models with exit code 75, to be started again. Data are read from
``UDA_SHARED_DATA`` or ``../shared/data``. Records: the source model, Meta-DMoE's student before its step on the
stream, and Meta-DMoE, in batches of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ledgers import keys_of, stopper
from torch import Tensor, nn
from uda_testtime.meta_dmoe import MetaDMoE
from uda_testtime.plugin import adapter_of

from uda.cli import main as uda
from uda.commands.inspect import built, loaded
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
DOMAINS = ["art_painting", "cartoon", "photo"]
BATCH = 64


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right labels."""
    return float((torch.cat([net(part).argmax(1) for part in x.split(BATCH)]) == y).double().mean())


def accuracies(target: str, seed: int, cache: Path) -> dict[str, float]:
    """Of the source model, the student and the method on one target."""
    sources = [d for d in DOMAINS if d != target]
    words = [
        "--config", str(ROOT / "configs" / "pacs_features_multi_source_only.yaml"),
        f"--data.reader.init_args.path={DATA / 'pacs_efficientnet_lite0.npz'}", f"--data.source={json.dumps(sources)}",
        f"--data.target={target}", f"--seed_everything={seed}", f"--data.eval_batch_size={BATCH}",
    ]  # fmt: skip
    run = cache / f"{target}_{seed}"
    if not (run / "summary.json").is_file():
        resume = ["--ckpt_path", "last"] if (run / "run.json").is_file() else []
        more = ["--trainer.enable_progress_bar=false", "--trainer.check_val_every_n_epoch=10", "--trainer.logger=false"]
        if code := uda(["fit", *words, *more, "--run_dir", str(run), *resume]):
            sys.exit(code)
    _, data = built(words, "identity")
    data.setup("test")
    model = loaded(str(run / "checkpoints" / "last.ckpt"))
    loaders = data.predict_dataloader()
    batches = list(loaders[0])
    x, y = (torch.cat([b[k] for b in batches]) for k in ("x", "y"))
    adapter = adapter_of(model, MetaDMoE(), data, seed=seed)
    out = {"source": accuracy(model, x, y), "meta_dmoe_no_step": accuracy(adapter.net, x, y)}
    labels = torch.cat([adapter(part).argmax(1) for part in x.split(BATCH)])
    return {**out, "meta_dmoe": float((labels == y).double().mean())}


def record(target: str, method: str, seed: int, value: float, seconds: float) -> dict[str, Any]:
    """One line of the ledger."""
    return {
        "suite": "pacs_sources", "task": f"to {target}", "method": method, "seed": seed,
        "key": f"pacs_sources/{target}/{method}/{seed}", "status": "finished", "select_by": None, "scores": {},
        "metrics": {next(iter(MEASURES)): {"last": round(value, 6)}}, "seconds": round(seconds, 3),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_sources")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two models after so long")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    stop_in_time = stopper(args.minutes)
    done = keys_of(args.ledger)
    for seed in args.seeds:
        for target in DOMAINS:
            if record(target, "meta_dmoe", seed, 0.0, 0.0)["key"] in done:
                continue
            stop_in_time()
            start = time.perf_counter()
            found = accuracies(target, seed, args.cache)
            seconds = time.perf_counter() - start
            with args.ledger.open("a") as out:
                out.writelines(json.dumps(record(target, m, seed, v, seconds)) + "\n" for m, v in found.items())


if __name__ == "__main__":
    main()
