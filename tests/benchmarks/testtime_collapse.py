"""A long stream: the same samples come again and again, in batches of 16, and a method never starts anew.

    python tests/benchmarks/testtime_collapse.py LEDGER.jsonl [--cache DIR] [--minutes 4] [--rounds 10] [--seeds 0 1 2]

The source model is that of the suite ``pacs_features`` of ``testtime.py``. One walk is ``--rounds`` times the same 200
samples of each of its three domains, mixed, in a new order in each round. Recorded are the accuracies of predictions
made on arrival in some of the rounds, as tasks of a ledger from which `uda bench table` makes the page's table; the
rollbacks and updates of a walk stand in its records.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from ledgers import keys_of, stopper
from testtime import SUITES, Suite
from uda_testtime import Adapter, Guard, SourceSamples
from uda_testtime.registry import method_class
from uda_testtime.streams import Shift, Stream
from uda_testtime.walk import Walk

from uda.metrics.names import MEASURES

BATCH, SAMPLES, SHOWN = 16, 200, (1, 2, 5, 10)
#: By name in the table: method, its arguments, and whether the guard watches. 0.01 is ten times the published rate.
VARIANTS: dict[str, tuple[str, dict, bool]] = {
    "source": ("Source", {}, False),
    "bn_statistics": ("BNStatistics", {}, False),
    "tent_0.001": ("TENT", {"lr": 1e-3}, False),
    "tent_0.01": ("TENT", {"lr": 1e-2}, False),
    "tent_0.01_guarded": ("TENT", {"lr": 1e-2}, True),
    "tent_0.03": ("TENT", {"lr": 3e-2}, False),
    "tent_0.03_guarded": ("TENT", {"lr": 3e-2}, True),
    "sar_0.01": ("SAR", {"lr": 1e-2}, False),
    "roid_0.01": ("ROID", {"lr": 1e-2}, False),
}


def walked(suite: Suite, variant: str, seed: int, rounds: int) -> list[dict]:
    """A record for each round that is shown."""
    name, arguments, guarded = VARIANTS[variant]
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(len(shift))[:SAMPLES] for shift in suite.shifts]
    x = torch.cat([shift.x[torch.from_numpy(rows)] for shift, rows in zip(suite.shifts, kept, strict=True)])
    y = np.concatenate([shift.y[rows] for shift, rows in zip(suite.shifts, kept, strict=True)])
    shifts = [Shift(f"round {i + 1}", x, y) for i in range(rounds)]  # each comes in an order of its own
    adapter = Adapter(
        suite.net, method_class(name)(**arguments), guard=Guard() if guarded else None, seed=seed, **suite.scale
    )
    if not adapter.ready:
        adapter.prepare(SourceSamples(*suite.source))
    start = time.perf_counter()
    walk = Walk(adapter, Stream(shifts, "continual", BATCH, seed)).run()
    figures, seconds = walk.figures(), round(time.perf_counter() - start, 3)
    rolled = [row["batch"] for row in walk.logs if row["rollbacks"]]
    return [{
        "suite": "collapse", "task": f"round {i}", "method": variant, "seed": seed,
        "key": f"{rounds}/{i}/{variant}/{seed}",
        "status": "finished", "select_by": None, "scores": {}, "seconds": seconds, "samples": figures["samples"],
        "metrics": {next(iter(MEASURES)): {
            "last": round(1 - figures["oracle_error_by_shift"][f"round {i}"] / 100, 6)}},
        "arguments": arguments, "updates": figures["updates"], "rollbacks": figures["rollbacks"],
        "rolled_back_at": rolled[:50],
    } for i in SHOWN if i <= rounds]  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_benchmark")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two walks after so long")
    parser.add_argument("--rounds", type=int, default=max(SHOWN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    stop_in_time = stopper(args.minutes)
    done = keys_of(args.ledger)
    suite = SUITES["pacs_features"](args.cache)
    for seed in args.seeds:
        for variant in VARIANTS:
            if f"{args.rounds}/1/{variant}/{seed}" in done:
                continue
            stop_in_time()
            records = walked(suite, variant, seed, args.rounds)
            with args.ledger.open("a") as out:
                out.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
