"""Test-time adaptation along streams: the ledger of docs/benchmarks/testtime.md.

    python tests/benchmarks/testtime.py LEDGER.jsonl [--cache DIR] [--minutes 4] [--suites ...] [--methods ...]

Small source models are trained once (kept in the cache folder), then each method walks each stream. What the ledger has
is not made again; after ``--minutes`` the script stops between two walks with exit code 75, to be started again. Data
are read from ``UDA_SHARED_DATA`` or ``../shared/data``. `uda bench table LEDGER.jsonl` makes the tables.

A figure is the accuracy of the predictions made on arrival, averaged over the shifts of a stream.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from ledgers import keys_of, stopper
from torch import Tensor, nn
from torch.nn import functional as F
from uda_testtime import Adapter, SourceSamples
from uda_testtime.corruptions import CORRUPTIONS, corrupt_images
from uda_testtime.registry import method_class, methods
from uda_testtime.streams import Shift, Stream
from uda_testtime.walk import Walk

from uda.errors import UDAError
from uda.metrics.names import MEASURES

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("UDA_SHARED_DATA", ROOT.parent / "shared" / "data"))
#: Published settings for CIFAR-10-C, defaults otherwise; a method that is not named here joins by its class name with
#: its defaults. Digits are not mirrored in views.
METHODS: dict[str, tuple[str, dict]] = {
    "source": ("Source", {}),
    "bn_statistics": ("BNStatistics", {}),
    "bn_mixed": ("BNStatistics", {"source_weight": 0.9}),
    "tent": ("TENT", {"lr": 1e-3}),
    "eta": ("ETA", {"lr": 1e-3}),
    "eata": ("EATA", {"lr": 1e-3}),
    "sar": ("SAR", {"lr": 1e-3}),
    "core": ("Core", {"lr": 1e-3}),
    "lame": ("LAME", {}),
    "rotta": ("RoTTA", {}),
    "roid": ("ROID", {}),
    "santa": ("SANTA", {}),
    "rmt": ("RMT", {}),
    "cotta": ("CoTTA", {}),
    "petal": ("PETAL", {}),
    "adacontrast": ("AdaContrast", {}),
    "memo": ("MEMO", {}),
    "note": ("NOTE", {}),
    "lsa": ("LSA", {"arguments": {"lr": 1e-3}}),
    "vdp": ("VDP", {}),
    "vida": ("ViDA", {}),
    "becotta": ("BECoTTA", {}),
    "rna": ("RNA", {}),
}
#: Why a method comes to what it does: not among the default ones.
CONTROLS: dict[str, tuple[str, dict]] = {
    "cotta_no_views": ("CoTTA", {"threshold": 0.0}),
    "note_no_training": ("NOTE", {"epochs": 0}),
    "lsa_source_prior": ("LSA", {"method": "Source", "condition": "prior"}),
    "vdp_source_0.01": ("VDP", {"lr": 1e-2, "source_weight": 1.0}),
    "becotta_warm_up": ("BECoTTA", {"lr": 0.0}),
    "rna_clean": ("RNA", {"domains": 1}),
}
#: Samples of each shift in streams that would take too long, by suite and batch size.
SHORTER: dict[tuple[str, int], int] = {("digits", 1): 200, ("pacs_features", 1): 200, ("mnist", 1): 100}
SETTINGS = ("reset", "continual", "correlated")
BATCHES = (64, 16, 1)
MEAN, STD = 0.5, 0.25  # of pixels, the same for every image suite


# ------------------------------------------------------------------------------------------------- networks


def norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(width // 8, width)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, kind: str, a: int, b: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(kind, b), nn.ReLU(),
            nn.Conv2d(b, b, 3, 1, 1, bias=False), norm(kind, b),
        )  # fmt: skip
        self.skip = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), norm(kind, b)) if a != b else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet(kind: str, stem_stride: int = 2, channels: int = 3, classes: int = 10) -> nn.Module:
    """ResNet-8: three blocks of 24, 48 and 96 channels."""
    w = (24, 48, 96)
    return nn.Sequential(
        nn.Conv2d(channels, w[0], 3, stem_stride, 1, bias=False), norm(kind, w[0]), nn.ReLU(),
        Block(kind, w[0], w[0], 1), Block(kind, w[0], w[1], 2), Block(kind, w[1], w[2], 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w[2], classes),
    )  # fmt: skip


def mlp() -> nn.Module:
    """On frozen features."""
    return nn.Sequential(nn.Linear(1280, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 7))


def train(net: nn.Module, x: Tensor, y: Tensor, epochs: int, augment: Callable | None = None, lr: float = 3e-3) -> None:
    """AdamW, one cycle, batches of 64."""
    g = torch.Generator().manual_seed(0)
    steps = epochs * (len(x) // 64)
    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(64)[: len(x) // 64]:
            batch = augment(x[rows], g) if augment else x[rows]
            loss = F.cross_entropy(net(batch), y[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    net.eval()


def shifted(x: Tensor, g: torch.Generator) -> Tensor:
    """Mirrors half, and moves a batch by up to four pixels."""
    flip = torch.rand(len(x), generator=g) < 0.5
    dy, dx = torch.randint(0, 9, (2,), generator=g).tolist()
    x = F.pad(torch.where(flip[:, None, None, None], x.flip(-1), x), [4] * 4, value=-MEAN / STD)
    return x[:, :, dy : dy + 32, dx : dx + 32]


def pixels(x: np.ndarray) -> Tensor:
    """uint8 ``[N, H, W]`` or ``[N, H, W, 3]`` as the networks take it."""
    t = torch.from_numpy(x).float() / 255
    t = t[:, None] if t.dim() == 3 else t.permute(0, 3, 1, 2)
    return (t - MEAN) / STD


# --------------------------------------------------------------------------------------------------- suites


class Suite:
    """A source model and the shifts of its stream. ``limit``: samples of each shift, drawn by the seed of the order."""

    def __init__(self, folder: Path, name: str, net: nn.Module, source: tuple[Tensor, Tensor], shifts: list[Shift],
                 limit: int, epochs: int, augment: Callable | None = None, images: bool = True) -> None:  # fmt: skip
        self.name, self.net, self.source, self.shifts, self.limit = name, net, source, shifts, limit
        self.mirrored = augment is not None
        self.scale = {"mean": MEAN, "std": STD} if images else {}
        file = folder / f"{name}.pt"
        if file.is_file():
            net.load_state_dict(torch.load(file, weights_only=True))
            net.eval()
        else:
            train(net, *source, epochs, augment)
            torch.save(net.state_dict(), file)


@cache
def cifar() -> tuple[np.ndarray, np.ndarray]:
    with np.load(DATA / "cifar10.npz") as f:
        order = np.random.default_rng(0).permutation(len(f["y"]))
        return f["x"][order], f["y"][order].astype(np.int64)


def cifar_suite(folder: Path, name: str, kind: str, severity: int = 5) -> Suite:
    """2,000 images of four classes to train on; 400 others, corrupted in 15 ways, as the stream."""
    x, y = cifar()
    torch.manual_seed(0)
    shifts = [
        Shift(c, pixels(corrupt_images(x[2000:2400], c, severity, cache=folder)), y[2000:2400]) for c in CORRUPTIONS
    ]
    source = pixels(x[:2000]), torch.from_numpy(y[:2000])
    net = resnet(kind, classes=int(y.max()) + 1)
    return Suite(folder, name, net, source, shifts, 100, 30, shifted)


def digits_suite(folder: Path) -> Suite:
    """Digits rendered from fonts, then written by hand, 8x8."""
    from uda.data import Digits

    def taken(name: str) -> tuple[Tensor, np.ndarray]:
        data = Digits().read(name)
        x = data.inputs.fetch(torch.arange(len(data)))
        return ((x if x.dim() == 4 else x[:, None]) - MEAN) / STD, data.labels.numpy()

    torch.manual_seed(0)
    x, y = taken("rendered")
    shifts = [Shift("handwritten", *taken("handwritten"))]
    return Suite(folder, "digits", resnet("batch", 1, 1), (x, torch.from_numpy(y)), shifts, 1000, 6)


def mnist_suite(folder: Path, name: str = "mnist", usps_alone: bool = False) -> Suite:
    """Trained on 4,000 of MNIST; others of it, USPS, MNIST-M (its first four digits alone), at 28x28 gray.

    The file's rows are sorted by class, and its test rows of MNIST and MNIST-M hold its first classes only.
    """
    with np.load(DATA / "digits.npz") as f:
        def gray(x: np.ndarray) -> Tensor:
            t = torch.from_numpy(x).float() / 255
            t = t[:, None] if t.dim() == 3 else (t @ torch.tensor([0.299, 0.587, 0.114]))[:, None]
            return (F.interpolate(t, (28, 28), mode="bilinear", antialias=True) - MEAN) / STD

        order = np.random.default_rng(0).permutation(len(f["mnist_train_y"]))
        x, y = gray(f["mnist_train_x"][order]), f["mnist_train_y"][order].astype(np.int64)
        others = [Shift(k, gray(f[f"{k}_train_x"]), f[f"{k}_train_y"].astype(np.int64)) for k in ("usps", "mnistm")]
        shifts = others[:1] if usps_alone else [Shift("mnist", x[4000:], y[4000:]), *others]
    torch.manual_seed(0)
    net = resnet("batch", 2, 1)
    source = x[:4000], torch.from_numpy(y[:4000])
    return Suite(folder, name, net, source, shifts, 2000 if usps_alone else 500, 4)


def pacs_suite(folder: Path) -> Suite:
    """Trained on four fifths of the art paintings (frozen features); the others, cartoons, photos."""
    with np.load(DATA / "pacs_efficientnet_lite0.npz") as f:
        names = ("art_painting", "cartoon", "photo")
        x = {n: torch.from_numpy(f[f"{n}_x"].astype(np.float32)) for n in names}
        kinds = sorted({str(v) for n in names for v in f[f"{n}_y"]})
        y = {n: np.array([kinds.index(str(v)) for v in f[f"{n}_y"]]) for n in names}
    order = np.random.default_rng(0).permutation(len(y["art_painting"]))
    cut = len(order) * 4 // 5
    art_x, art_y = x["art_painting"], y["art_painting"]
    shifts = [Shift("art_painting", art_x[order[cut:]], art_y[order[cut:]]),
              *(Shift(n, x[n], y[n]) for n in names[1:])]  # fmt: skip
    torch.manual_seed(0)
    source = art_x[order[:cut]], torch.from_numpy(art_y[order[:cut]])
    return Suite(folder, "pacs_features", mlp(), source, shifts, 400, 15, images=False)


SUITES: dict[str, Callable[[Path], Suite]] = {
    "digits": digits_suite,
    "pacs_features": pacs_suite,
    "mnist": mnist_suite,
    "usps": lambda folder: mnist_suite(folder, "usps", usps_alone=True),
    "cifar_bn": lambda folder: cifar_suite(folder, "cifar_bn", "batch"),
    "cifar_gn": lambda folder: cifar_suite(folder, "cifar_gn", "group"),
}


# ---------------------------------------------------------------------------------------------------- walks


def settings(method: str) -> tuple[str, dict]:
    """Class name and arguments of a name in the tables."""
    return {**METHODS, **CONTROLS}.get(method, (method, {}))


def adapter_of(suite: Suite, method: str, seed: int, folder: Path) -> Adapter:
    """Made ready from a file, which is written at the first time, whatever the seed, for each set of arguments."""
    name, arguments = settings(method)
    kind = method_class(name)
    if "flip" in inspect.signature(kind).parameters:
        arguments = {"flip": suite.mirrored, **arguments}
    out = Adapter(suite.net, kind(**arguments), seed=seed, **suite.scale)
    if not out.ready:
        made_by = hashlib.sha256(json.dumps(out.method.told(), sort_keys=True).encode()).hexdigest()[:12]
        file = folder / f"{suite.name}_{method}_{made_by}.ready"
        if not file.is_file():
            first = Adapter(suite.net, kind(**arguments), **suite.scale)
            first.prepare(SourceSamples(*suite.source))
            first.save_prepared(file)
        out.load_prepared(file)
    return out


def walked(suite: Suite, method: str, setting: str, size: int, seed: int, folder: Path) -> dict:
    """One record of the ledger."""
    stream = Stream(suite.shifts, setting, size, seed, limit=SHORTER.get((suite.name, size), suite.limit))
    adapter = adapter_of(suite, method, seed, folder)
    start = time.perf_counter()
    figures = Walk(adapter, stream).run().figures()
    return {
        "suite": suite.name, "task": f"{suite.name} {setting} {size}", "method": method, "seed": seed,
        "key": f"{suite.name}/{setting}/{size}/{method}/{seed}", "status": "finished", "select_by": None,
        "metrics": {next(iter(MEASURES)): {"last": round(1 - figures["oracle_shift_mean_error"] / 100, 6)}},
        "scores": {}, "seconds": round(time.perf_counter() - start, 3), "updates": figures["updates"],
        "rollbacks": figures["rollbacks"], "samples": figures["samples"],
        "arguments": settings(method)[1],
        "by_shift": {k: round(1 - v / 100, 4) for k, v in figures["oracle_error_by_shift"].items()},
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_benchmark")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop between two walks after so long")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="also any name of the registry, or `all`")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    stop_in_time = stopper(args.minutes)
    done = keys_of(args.ledger)
    named = {name for name, _ in METHODS.values()}
    chosen = [*METHODS, *(n for n in methods() if n not in named)] if args.methods == ["all"] else args.methods
    made: dict[str, Suite] = {}
    for seed in args.seeds:
        for suite in args.suites:
            for size in args.batches:
                for setting in args.settings:
                    for method in chosen:
                        if suite in ("digits", "usps") and setting == "reset":  # one shift: the same as continual
                            continue
                        if f"{suite}/{setting}/{size}/{method}/{seed}" in done:
                            continue
                        stop_in_time()
                        if suite not in made:
                            made[suite] = SUITES[suite](args.cache)
                        try:
                            record = walked(made[suite], method, setting, size, seed, args.cache)
                        except UDAError as error:  # such as BatchNorm statistics of a net without BatchNorm
                            print(f"{suite}: {method}: {error}", file=sys.stderr)
                            done |= {f"{suite}/{s}/{size}/{method}/{k}" for s in args.settings for k in args.seeds}
                            continue
                        with args.ledger.open("a") as out:
                            out.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
