"""What ParetoDA's weighing adds to a step: ResNet-18 at 64 px, three objectives, by level of the inner products.

    python tests/benchmarks/weighing_cost.py [--rounds 5] [--steps 6] [--weighers ParetoDA MGDA]

Each round runs all variants in turn on the same nets and batches, so that a drift of the machine's speed touches all of
them: the objectives alone (nobody weighs, no held-out batch), and the same weighed at the level of features and at that
of parameters. For ParetoDA the cheap level compares gradients of the bottleneck's parameters and weighs at the features
(held-out samples have no features in common with others). Printed are medians over rounds: milliseconds a step, and the
weighing's share of the step without it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings

import lightning as L
import torch
from torch.utils.data import DataLoader

import uda

WARM_UP = 2
BATCH, SHAPE, CLASSES = 16, (3, 64, 64), 10
LEVELS = {
    "ParetoDA": ("bottleneck", "parameters"),
    **dict.fromkeys(("MGDA", "PCGrad", "CAGrad"), ("features", "parameters")),
}


class Clock(L.Callback):
    """Seconds from the end of warm-up to the end of the epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        self.seconds = time.perf_counter() - self.begin


def batches(steps: int) -> list[dict]:
    """The same batches for every variant."""
    make = torch.Generator().manual_seed(0)

    def images() -> torch.Tensor:
        return torch.randn(BATCH, *SHAPE, generator=make)

    y = torch.randint(0, CLASSES, (BATCH,), generator=make)
    one = {"sources": {"source": {"x": images(), "y": y}}, "target": {"x": images()}, "held_out": {"x": images()}}
    return [one] * (WARM_UP + steps)


def run(weigher: str, level: str | None, steps: int) -> float:
    """Milliseconds of a step; without a level nobody weighs."""
    torch.manual_seed(0)
    plugins = {"align": {"class_path": "DANN"}, "mimic": {"class_path": "ParetoDA", "init_args": {"hidden": 64}}}
    if level is not None and weigher == "ParetoDA":
        plugins["mimic"]["init_args"]["level"] = level
    elif level is not None:  # before ParetoDA, whose objectives stay
        plugins = {"weigh": {"class_path": weigher, "init_args": {"level": level}}, **plugins}
    model = uda.UDA(
        "torchvision:resnet18", plugins=plugins, bottleneck=256, num_classes=CLASSES, input_shape=list(SHAPE),
        source_names=["source"], scores=[],
    )  # fmt: skip
    if level is None:
        model.hooks._calls["weigh_objectives"] = []
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[clock], use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(batches(steps), batch_size=None, collate_fn=lambda x: x))
    return 1e3 * clock.seconds / steps


def main() -> None:
    """Print a line a weigher and level."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--weighers", nargs="+", choices=LEVELS, default=["ParetoDA"])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    variants = [(w, level) for w in given.weighers for level in LEVELS[w]]
    plain: list[float] = []
    times: dict[tuple[str, str], list[float]] = {v: [] for v in variants}
    for _ in range(given.rounds):
        plain.append(run("ParetoDA", None, given.steps))
        for weigher, level in variants:
            times[weigher, level].append(run(weigher, level, given.steps))
    print(f"no weighing          {statistics.median(plain):8.1f} ms a step")
    for (weigher, level), found in times.items():
        share = statistics.median(t / p - 1 for t, p in zip(found, plain, strict=True))
        print(f"{weigher:9s}{level:12s}{statistics.median(found):8.1f} ms a step, weighing adds {100 * share:.0f} %")


if __name__ == "__main__":
    main()
