"""Cost of a DANN step in ``uda`` beside a hand-written loop and beside plain Lightning, on the same nets and batches.

    python tests/benchmarks/step_overhead.py [--size tiny resnet18] [--rounds 7]

The three variants run in turn within each round, so that a drift of the machine's speed touches all of them; what is
printed are medians of the per-round ratios, and for the tiny size the difference in milliseconds.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import time
import warnings

import lightning as L
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import uda
from uda.nn import DomainDiscriminator, reverse_gradient, warm_start

SIZES = {  # input shape, batch a domain, timed steps a round, backbone
    "tiny": ((1, 8, 8), 32, 300, "small_cnn"),
    "resnet18": ((3, 64, 64), 16, 8, "torchvision:resnet18"),
}
WARM_UP = 5


class Fixed(Dataset):
    """The same batches for every variant, made beforehand: loading costs nothing."""

    def __init__(self, shape: tuple[int, ...], batch: int, steps: int) -> None:
        make = torch.Generator().manual_seed(0)
        pool = []
        for _ in range(min(steps, 8)):
            source = {
                "x": torch.randn(batch, *shape, generator=make),
                "y": torch.randint(0, 10, (batch,), generator=make),
                "index": torch.arange(batch),
            }
            target = {"x": torch.randn(batch, *shape, generator=make), "index": torch.arange(batch)}
            pool.append({"sources": {"source": source}, "target": target})
        self.pool, self.steps = pool, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, i: int) -> dict:
        return self.pool[i % len(self.pool)]


def loader(size: str) -> DataLoader:
    """A loader whose items are whole batches."""
    shape, batch, steps, _ = SIZES[size]
    return DataLoader(Fixed(shape, batch, WARM_UP + steps), batch_size=None, collate_fn=lambda x: x)


def make_model(size: str) -> uda.UDA:
    """The model whose nets all variants share."""
    torch.manual_seed(0)
    return uda.UDA(
        SIZES[size][3], plugins={"align": {"class_path": "DANN", "init_args": {"hidden": 256}}}, bottleneck=128,
        num_classes=10, input_shape=list(SIZES[size][0]), source_names=["source"],
    )  # fmt: skip


class Clock(L.Callback):
    """Seconds from the end of warm-up to the end of the epoch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == WARM_UP:
            self.begin = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        self.seconds = time.perf_counter() - self.begin


class PlainLightning(L.LightningModule):
    """DANN as one writes it by hand in a LightningModule."""

    def __init__(self, net: uda.UDA, steps: int) -> None:
        super().__init__()
        self.backbone, self.bottleneck, self.head = net.backbone, net.bottleneck, net.head
        self.discriminator: DomainDiscriminator = net.plugins["align"].discriminator
        self.steps = steps

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: (1 + 10 * i / self.steps) ** -0.75)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch, batch_idx):
        return dann_loss(self, batch, batch_idx / self.steps)


def dann_loss(net, batch, progress: float):
    """The objective by hand: one joint forward, one discriminator forward."""
    source, target = batch["sources"]["source"], batch["target"]
    features = net.bottleneck(net.backbone(torch.cat([source["x"], target["x"]])))
    n = len(source["x"])
    loss = F.cross_entropy(net.head(features[:n]), source["y"])
    domain = net.discriminator(reverse_gradient(features, warm_start(progress))).squeeze(1)
    with torch.autocast("cpu", enabled=False):
        ones, zeros = torch.ones_like(domain[:n]), torch.zeros_like(domain[n:])
        adversarial = (
            F.binary_cross_entropy_with_logits(domain[:n], ones) + F.binary_cross_entropy_with_logits(domain[n:], zeros)
        ) / 2
    return loss + adversarial


def run_loop(net, size: str) -> float:
    """Seconds of the hand-written loop."""
    module = PlainLightning(net, WARM_UP + SIZES[size][2]).train()
    optimizers = module.configure_optimizers()
    optimizer, scheduler = optimizers["optimizer"], optimizers["lr_scheduler"]["scheduler"]
    begin = 0.0
    for i, batch in enumerate(loader(size)):
        if i == WARM_UP:
            begin = time.perf_counter()
        loss = dann_loss(module, batch, i / module.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return time.perf_counter() - begin


def run_trainer(module: L.LightningModule, size: str) -> float:
    """Seconds of a Lightning module."""
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[clock], log_every_n_steps=50,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, loader(size))
    return clock.seconds


def compare(size: str, rounds: int) -> dict[str, float]:
    """Medians over rounds of milliseconds and ratios."""
    steps = SIZES[size][2]
    times: dict[str, list[float]] = {"loop": [], "lightning": [], "uda": []}
    model = make_model(size)
    for _ in range(rounds):
        times["loop"].append(run_loop(copy.deepcopy(model), size))
        times["lightning"].append(run_trainer(PlainLightning(copy.deepcopy(model), WARM_UP + steps), size))
        times["uda"].append(run_trainer(copy.deepcopy(model), size))
    median = statistics.median
    ms = {k: 1e3 * median(v) / steps for k, v in times.items()}
    return {
        **{f"ms_{k}": v for k, v in ms.items()},
        "lightning_over_loop": median(a / b for a, b in zip(times["lightning"], times["loop"], strict=True)),
        "uda_over_loop": median(a / b for a, b in zip(times["uda"], times["loop"], strict=True)),
        "uda_over_lightning": median(a / b for a, b in zip(times["uda"], times["lightning"], strict=True)),
        "ms_uda_above_lightning": 1e3
        * median((a - b) / steps for a, b in zip(times["uda"], times["lightning"], strict=True)),
    }


def main() -> None:
    """Print one line a size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for size in arguments.size:
        r = compare(size, arguments.rounds)
        print(
            f"{size:9s} loop {r['ms_loop']:.2f} ms  lightning {r['ms_lightning']:.2f} ms  uda {r['ms_uda']:.2f} ms | "
            f"lightning/loop {r['lightning_over_loop']:.3f}  uda/loop {r['uda_over_loop']:.3f}  "
            f"uda/lightning {r['uda_over_lightning']:.3f}  uda - lightning {r['ms_uda_above_lightning']:+.3f} ms"
        )


if __name__ == "__main__":
    main()
