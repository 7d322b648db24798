"""Sub-prototypes where classes have two looks: digits merged in pairs (0+1, 2+3, ...), rendered to handwritten.

    python tests/benchmarks/memspm_subprototypes.py [--memories 0x0 5x1 5x2 10x1] [--seeds 0 1 2] [--epochs 10]

MemSPM with memories of N items of S sub-prototypes, as many items as classes: one of a sub-prototype an item against
several at the same N, and against as many vectors in all; 0x0 is source-only. Figures of the last epoch, nothing is
chosen by them: accuracy on held-out source samples; accuracy on the target by the labels, which a rejection leaves
beside its mark (no class of this task is unknown); the share of the target that is rejected.
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

MEMORIES = ("0x0", "5x1", "5x2", "10x1", "5x4", "20x1")


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


def run(items: int, subs: int, seed: int, epochs: int, **options: object) -> list[float]:
    """Source accuracy, target accuracy by the labels, and the rejected share, of the last epoch."""
    L.seed_everything(seed, verbose=False)
    given = {"weight": 0.1, "refresh_every": 100, "warmup": 0.13, "picture": False} | options
    plugins = {"align": MemSPM(items=items, subs=subs, top=min(3, items), **given)} if items else {}
    model = uda.UDA(
        "small_cnn", plugins, bottleneck=128, forward_mode="separate",
        optimizer=lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.001),
    )  # fmt: skip
    data = uda.DataModule(MergedDigits(), "rendered", "handwritten", seed=seed, batch_size=64, epoch_steps=50)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, check_val_every_n_epoch=epochs, **dict.fromkeys(off, False)
    )
    trainer.fit(model, data)
    right, rejected = [], []
    with torch.no_grad():
        for batch in data.val_dataloader()[1]:
            found = model.eval().predict_batch(model.batch(batch["x"], index=batch["index"]))
            right.append((found.label == batch["y"]).float())
            rejected.append(torch.zeros_like(right[-1]) if found.unknown is None else found.unknown.float())
    return [
        float(trainer.callback_metrics["source_accuracy"]),
        *(float(torch.cat(v).mean()) for v in (right, rejected)),
    ]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memories", nargs="+", default=list(MEMORIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    print("| items x sub-prototypes | source | target | rejected | seconds |\n|---|---|---|---|---|")
    for memory in args.memories:
        start = time.perf_counter()
        got = [run(*map(int, memory.split("x")), seed, args.epochs) for seed in args.seeds]
        cells = [
            f"{100 * statistics.mean(v):.1f} ± {100 * (statistics.stdev(v) if len(v) > 1 else 0):.1f}"
            for v in zip(*got, strict=True)
        ]
        print(f"| {memory} | {' | '.join(cells)} | {(time.perf_counter() - start) / len(got):.0f} |", flush=True)


if __name__ == "__main__":
    main()
