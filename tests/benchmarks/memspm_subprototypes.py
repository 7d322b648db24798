"""Sub-prototypes where classes have two looks: digits merged in pairs (0+1, 2+3, ...), rendered to handwritten.

    python tests/benchmarks/memspm_subprototypes.py [--seeds 0 1 2] [--epochs 10]

MemSPM with memories of N items of S sub-prototypes: one of a sub-prototype an item against several at the same N, and
against as many vectors in all. Accuracy on the target in the last epoch; nothing is chosen by it.
"""

from __future__ import annotations

import argparse
import statistics
import time

import lightning as L
import torch
from uda_universal import MemSPM

import uda
from uda.data import DomainData, Reader

MEMORIES = ((10, 1), (10, 4), (40, 1))


class MergedDigits(Reader):
    """Digits in five classes of two figures each."""

    def __init__(self) -> None:
        self.digits = uda.data.Digits(n_rendered=2000)

    def domains(self) -> list[str]:
        """Names of the domains."""
        return self.digits.domains()

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        found = self.digits.read(domain)
        return DomainData(domain, found.inputs, found.labels // 2, [f"{c}+{c + 1}" for c in range(0, 10, 2)])


def run(items: int, subs: int, seed: int, epochs: int) -> tuple[float, float]:
    """Target accuracy and the share of dead sub-prototypes of the last epoch."""
    L.seed_everything(seed, verbose=False)
    plugin = MemSPM(items=items, subs=subs, top=min(3, items), weight=0.1, refresh_every=100, warmup=0.13)
    model = uda.UDA(
        "small_cnn", {"align": plugin}, bottleneck=128, forward_mode="separate",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.001),
    )  # fmt: skip
    data = uda.DataModule(MergedDigits(), "rendered", "handwritten", seed=seed, batch_size=64, epoch_steps=50)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    trainer.fit(model, data)
    return float(trainer.callback_metrics["oracle/target_accuracy"]), float((plugin.used == 0).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    print("| items | sub-prototypes | target accuracy | unused at the end | seconds |\n|---|---|---|---|---|")
    for items, subs in MEMORIES:
        start = time.perf_counter()
        got = [run(items, subs, seed, args.epochs) for seed in args.seeds]
        accuracy = [100 * a for a, _ in got]
        spread = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        dead = 100 * statistics.mean(d for _, d in got)
        seconds = (time.perf_counter() - start) / len(got)
        print(f"| {items} | {subs} | {statistics.mean(accuracy):.1f} ± {spread:.1f} | {dead:.0f} % | {seconds:.0f} |",
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
