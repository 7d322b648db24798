"""Sub-prototypes where classes have two looks: classes merged in pairs, with an encoder that learns or a fixed one.

    python tests/benchmarks/memspm_subprototypes.py [--task digits|features] [--memories 0x0 5x1 5x2] [--seeds 0 1 2]

``digits``: figures in pairs (0+1, 2+3, ...), rendered to handwritten, a CNN that learns. ``features``: dog+elephant,
giraffe+guitar, horse+house and person on PACS features, cartoon to photo, with no trained layer before the memory (the
published encoder is fixed too); reads pacs_efficientnet_lite0.npz in UDA_SHARED_DATA.

MemSPM with memories of N items of S sub-prototypes: one sub-prototype an item against several at the same N, and
against as many vectors in all; 0x0 is source-only. Figures of the last epoch, nothing is chosen by them: accuracy on
held-out source samples; accuracy on the target by the labels, which a rejection leaves beside its mark (no class of
these tasks is unknown); the share of the target that is rejected.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from uda_universal import MemSPM

import uda
from uda.data import DomainData, Reader

MEMORIES = {"digits": ("0x0", "5x1", "5x2", "10x1"), "features": ("0x0", "4x1", "4x2", "8x1")}
PAIRS = {"digits": ("rendered", "handwritten"), "features": ("cartoon", "photo")}


class Merged(Reader):
    """Classes of another reader in pairs: 0 and 1 are one class, 2 and 3 the next."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def domains(self) -> list[str]:
        """Names of the domains."""
        return self.reader.domains()

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        found = self.reader.read(domain)
        names = [str(n) for n in found.class_names]
        return DomainData(
            domain, found.inputs, found.labels // 2, ["+".join(names[c : c + 2]) for c in range(0, len(names), 2)]
        )


def run(items: int, subs: int, seed: int, epochs: int, task: str = "digits", **options: Any) -> list[float]:
    """Source accuracy, target accuracy by the labels, and the rejected share, of the last epoch."""
    L.seed_everything(seed, verbose=False)
    digits = task == "digits"
    given = ({"refresh_every": 100, "warmup": 0.13} if digits else {"freeze": True}) | options
    plugin = MemSPM(items=items, subs=subs, top=min(3, items), picture=False, **given) if items else None
    model = uda.UDA(
        "small_cnn" if digits else "identity", {"align": plugin} if plugin else {}, bottleneck=128 if digits else 0,
        forward_mode="separate",
        optimizer=lambda p: torch.optim.SGD(
            p, lr=0.02 if digits else 0.01, momentum=0.9, nesterov=True, weight_decay=0.001
        ),
    )  # fmt: skip
    if digits:
        reader = uda.data.Digits(n_rendered=2000)
    else:
        folder = Path(os.environ.get("UDA_SHARED_DATA", "../shared/data"))
        reader = uda.data.Arrays(str(folder / "pacs_efficientnet_lite0.npz"), kind="features")
    data = uda.DataModule(
        Merged(reader), *PAIRS[task], seed=seed, batch_size=64 if digits else 32, epoch_steps=50
    )  # fmt: skip
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, check_val_every_n_epoch=epochs, num_sanity_val_steps=0,
        **dict.fromkeys(off, False),
    )  # fmt: skip
    trainer.fit(model, data)
    right, rejected = [], []
    with torch.no_grad():
        for batch in data.val_dataloader()[1]:
            found = model.eval().predict_batch(model.batch(batch["x"], index=batch["index"]))
            right.append((found.label == batch["y"]).float())
            rejected.append(torch.zeros_like(right[-1]) if found.unknown is None else found.unknown.float())
    figures = (float(torch.cat(v).mean()) for v in (right, rejected))
    return [float(trainer.callback_metrics["source_accuracy"]), *figures]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=list(PAIRS), default="digits")
    parser.add_argument("--memories", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--memory_start", default="both", help="both, source or random")
    parser.add_argument("--epochs", type=int, default=10)
    args = parser.parse_args()
    print("| items x sub-prototypes | source | target | rejected | seconds |\n|---|---|---|---|---|")
    for memory in args.memories or MEMORIES[args.task]:
        start, (items, subs) = time.perf_counter(), map(int, memory.split("x"))
        got = [run(items, subs, seed, args.epochs, args.task, memory_start=args.memory_start) for seed in args.seeds]
        cells = [
            f"{100 * statistics.mean(v):.1f} ± {100 * (statistics.stdev(v) if len(v) > 1 else 0):.1f}"
            for v in zip(*got, strict=True)
        ]
        print(f"| {memory} | {' | '.join(cells)} | {(time.perf_counter() - start) / len(got):.0f} |", flush=True)


if __name__ == "__main__":
    main()
