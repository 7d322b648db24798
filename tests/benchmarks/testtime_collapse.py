"""Long streams: the same samples come again and again, and a method never starts anew.

    python tests/benchmarks/testtime_collapse.py LEDGER.jsonl [--cache DIR] [--minutes 4] [--seeds 0 1 2]
        [--scenarios batches singles]

The source models and samples are those of suites of ``testtime.py``. One walk is some rounds of the same samples of
each domain, mixed, in a new order in each round. Recorded are the accuracies of predictions made on arrival in some of
the rounds, as tasks of a ledger from which `uda bench table` makes the page's tables, and beside them the largest share
that one class has of a round's predictions; the rollbacks and updates of a walk stand in its records.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
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

Variants = dict[str, tuple[str, dict, bool]]
#: By name in the table: method, its arguments, and whether the guard watches. 0.01 is ten times the published rate.
BATCHES: Variants = {
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
#: GroupNorm, one sample at a time: a stream of SAR's "wild" settings, at the rate published for batches.
SINGLES: Variants = {
    "source": ("Source", {}, False),
    "tent_0.001": ("TENT", {"lr": 1e-3}, False),
    "tent_0.001_guarded": ("TENT", {"lr": 1e-3}, True),
    "sar_0.001": ("SAR", {"lr": 1e-3}, False),
}


@dataclass(frozen=True)
class Scenario:
    """A suite, samples of each of its domains in a round, the size of batches, rounds, those shown, and methods."""

    suite: str
    samples: int
    batch: int
    rounds: int
    shown: tuple[int, ...]
    variants: Variants
    prefix: str  # of keys

    def task(self, i: int) -> str:
        return f"round {i}" if self.batch > 1 else f"singles round {i}"


SCENARIOS = {
    "batches": Scenario("pacs_features", 200, 16, 10, (1, 2, 5, 10), BATCHES, "10"),
    "singles": Scenario("cifar_gn", 50, 1, 2, (1, 2), SINGLES, "singles"),
}


def walked(suite: Suite, scenario: Scenario, variant: str, seed: int) -> list[dict]:
    """A record for each round that is shown."""
    name, arguments, guarded = scenario.variants[variant]
    rng = np.random.default_rng(seed)
    kept = [rng.permutation(len(shift))[: scenario.samples] for shift in suite.shifts]
    x = torch.cat([shift.x[torch.from_numpy(rows)] for shift, rows in zip(suite.shifts, kept, strict=True)])
    y = np.concatenate([shift.y[rows] for shift, rows in zip(suite.shifts, kept, strict=True)])
    shifts = [Shift(f"round {i + 1}", x, y) for i in range(scenario.rounds)]  # each comes in an order of its own
    adapter = Adapter(
        suite.net, method_class(name)(**arguments), guard=Guard() if guarded else None, seed=seed, **suite.scale
    )
    if not adapter.ready:
        adapter.prepare(SourceSamples(*suite.source))
    start = time.perf_counter()
    walk = Walk(adapter, Stream(shifts, "continual", scenario.batch, seed)).run()
    figures, seconds = walk.figures(), round(time.perf_counter() - start, 3)
    rolled = [row["batch"] for row in walk.logs if row["rollbacks"]]
    predicted = [walk.labels[walk.stream.rows[:, 0] == i] for i in range(scenario.rounds)]
    return [{
        "suite": "collapse", "task": scenario.task(i), "method": variant, "seed": seed,
        "key": f"{scenario.prefix}/{i}/{variant}/{seed}",
        "status": "finished", "select_by": None, "scores": {}, "seconds": seconds, "samples": figures["samples"],
        "metrics": {next(iter(MEASURES)): {
            "last": round(1 - figures["oracle_error_by_shift"][f"round {i}"] / 100, 6)}},
        "top_share": round(float(np.bincount(predicted[i - 1]).max() / len(predicted[i - 1])), 4),
        "arguments": arguments, "updates": figures["updates"], "rollbacks": figures["rollbacks"],
        "rolled_back_at": rolled[:50],
    } for i in scenario.shown]  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_benchmark")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two walks after so long")
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    stop_in_time = stopper(args.minutes)
    done = keys_of(args.ledger)
    for scenario in (SCENARIOS[name] for name in args.scenarios):
        suite = SUITES[scenario.suite](args.cache)
        for seed, variant in ((s, v) for s in args.seeds for v in scenario.variants):
            if f"{scenario.prefix}/1/{variant}/{seed}" in done:
                continue
            stop_in_time()
            records = walked(suite, scenario, variant, seed)
            with args.ledger.open("a") as out:
                out.writelines(json.dumps(record) + "\n" for record in records)


if __name__ == "__main__":
    main()
