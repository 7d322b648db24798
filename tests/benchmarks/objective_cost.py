"""What an objective adds to a step: ResNet-18 at 64 px, beside the same step with an objective that costs nothing.

    python tests/benchmarks/objective_cost.py [DeepJDOT JUMBOT ...] [--rounds 5] [--steps 6] [--batch 32]

Each round runs all variants in turn on the same nets and batches, so that a drift of the machine's speed touches all of
them. The base is the entropy of the target's predictions: both domains are passed, and the objective itself is nothing.
Printed are medians over rounds: milliseconds a step, and the objective's share of the step of the base.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader
from weighing_cost import CLASSES, SHAPE, WARM_UP, Clock

import uda

BASE = "EntropyMinimisation"


def run(plugin: str, steps: int, batch: int) -> float:
    """Milliseconds of a step."""
    torch.manual_seed(0)
    make = torch.Generator().manual_seed(0)
    rows = [torch.randn(batch, *SHAPE, generator=make) for _ in range(2)]
    y = torch.arange(batch) % CLASSES
    one = {"sources": {"source": {"x": rows[0], "y": y}}, "target": {"x": rows[1]}}
    model = uda.UDA(
        "torchvision:resnet18", plugins={"align": {"class_path": plugin}}, bottleneck=256, num_classes=CLASSES,
        input_shape=list(SHAPE), source_names=["source"], scores=[],
    )  # fmt: skip
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[clock], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader([one] * (WARM_UP + steps), batch_size=None, collate_fn=lambda x: x))
    return 1e3 * clock.seconds / steps


def main() -> None:
    """Print a line a plugin."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plugins", nargs="*", default=["DeepJDOT", "JUMBOT", "Sinkhorn", "SlicedWasserstein", "KTF"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    times: dict[str, list[float]] = {name: [] for name in [BASE, *given.plugins]}
    for _ in range(given.rounds):
        for name, found in times.items():
            found.append(run(name, given.steps, given.batch))
    print(f"{BASE:20s}{statistics.median(times[BASE]):8.1f} ms a step")
    for name in given.plugins:
        share = statistics.median(t / p - 1 for t, p in zip(times[name], times[BASE], strict=True))
        print(f"{name:20s}{statistics.median(times[name]):8.1f} ms a step, adds {100 * share:.0f} %")


if __name__ == "__main__":
    main()
