"""A target known by its description alone: LanDA on digits, with a small encoder of images and words trained here.

    python tests/benchmarks/landa_digits.py [--seeds 0 1 2] [--steps 400]

The encoder learns rendered digits in four styles with their captions ("an inverted digit three") by a contrastive loss.
Then it is frozen. Sources are handwritten digits, plain and noisy; the target is the same kind of digits inverted or
coloured, of which LanDA uses no image (the encoder has seen rendered ones). Printed are target accuracies in %: of the
words alone (nearest caption), of a classifier on the sources' embeddings, and of LanDA's. Two minutes on one core.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from uda_multisource.landa import LanDA
from uda_multisource.language import JointEncoder, prompts

import uda
from uda.data.rendered import handwritten_digits, render_digits

STYLES = {"plain": "a plain digit {}", "noisy": "a noisy digit {}", "inverted": "an inverted digit {}",
          "coloured": "a coloured digit {}"}  # fmt: skip
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SOURCES, TARGETS = ("plain", "noisy"), ("inverted", "coloured")
WORDS = sorted({w for t in STYLES.values() for w in t.format("").split()} | set(NAMES))


def styled(x: Tensor, style: str) -> Tensor:
    """``[N, 1, 8, 8]`` ink -> ``[N, 3, 8, 8]`` in a style."""
    x = x.expand(-1, 3, -1, -1)
    if style == "noisy":
        return (x + 0.35 * torch.randn_like(x)).clamp(0, 1)
    if style == "inverted":
        return 1 - x
    if style == "coloured":
        ground, ink = 0.8 * torch.rand(len(x), 3, 1, 1), torch.rand(len(x), 3, 1, 1)
        return ground * (1 - x) + (0.5 + 0.5 * ink) * x
    return x


class Small(nn.Module, JointEncoder):
    """A CNN for images and a bag of words for texts, 64 dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64),
        )  # fmt: skip
        self.words = nn.Sequential(nn.Linear(len(WORDS), 64), nn.ReLU(), nn.Linear(64, 64))

    def images(self, x: Tensor) -> Tensor:
        return self.picture(x)

    def texts(self, texts: list[str]) -> Tensor:
        return self.words(torch.stack([torch.tensor([float(w in t.split()) for w in WORDS]) for t in texts]))


def encoder(seed: int, steps: int) -> Small:
    """Trained on rendered digits: each image's caption against all 40."""
    torch.manual_seed(seed)
    net, (x, y) = Small(), map(torch.from_numpy, render_digits(2000, 100 + seed))
    captions = [t.format(n) for t in STYLES.values() for n in NAMES]
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (len(STYLES), 32))
        images = torch.cat([styled(x[r], s) for r, s in zip(rows, STYLES, strict=True)])
        own = torch.cat([10 * i + y[r] for i, r in enumerate(rows)])
        z, t = F.normalize(net.images(images), dim=1), F.normalize(net.texts(captions), dim=1)
        optimizer.zero_grad()
        F.cross_entropy(z @ t.T / 0.07, own).backward()
        optimizer.step()
    return net.eval().requires_grad_(False)


def accuracy(folder: Path, target: str, seed: int, plugins: dict) -> float:
    """Of a run on embeddings, on the target's, in %."""
    L.seed_everything(seed, verbose=False)
    reader = uda.data.Arrays(str(folder / "z.npz"), kind="features", normalise="l2")
    model = uda.UDA("identity", plugins, bottleneck=0, optimizer=partial(torch.optim.Adam, lr=5e-3))
    data = uda.DataModule(reader, source=list(SOURCES), target=target, batch_size=64, epoch_steps=100, seed=seed)
    trainer = L.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0,
                        limit_val_batches=0)  # fmt: skip
    trainer.fit(model, data)
    found = reader.read(target)
    x = found.inputs.fetch(torch.arange(len(found.labels)))
    with torch.no_grad():
        return 100 * float((model.eval()(x.float()).argmax(1) == found.labels).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of the encoder's training")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    figures: dict[tuple[str, str], list[float]] = {}
    x, y = map(torch.from_numpy, handwritten_digits())
    for seed in args.seeds:
        net = encoder(seed, args.steps)
        with tempfile.TemporaryDirectory() as name:
            folder, arrays = Path(name), {}
            parts = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).chunk(3)
            for style, rows in zip((*SOURCES, TARGETS[0]), parts, strict=True):
                for own in TARGETS if style == TARGETS[0] else (style,):
                    arrays[f"{own}_x"], arrays[f"{own}_y"] = net.images(styled(x[rows], own)).numpy(), y[rows].numpy()
            np.savez(folder / "z.npz", **arrays)
            words = prompts(net, STYLES, NAMES)
            torch.save(words, folder / "words.pt")
            for target in TARGETS:
                z = F.normalize(torch.from_numpy(arrays[f"{target}_x"]), dim=1)
                near = (z @ words["text"][words["domains"].index(target)].T).argmax(1).numpy()
                plugin = LanDA(str(folder / "words.pt"), temperature=0.07)
                got = {
                    "words alone": 100 * float((near == arrays[f"{target}_y"]).mean()),
                    "source only": accuracy(folder, target, seed, {}),
                    "LanDA": accuracy(folder, target, seed, {"align": plugin}),
                }
                for method, value in got.items():
                    figures.setdefault((target, method), []).append(value)
                print(target, seed, {k: round(v, 1) for k, v in got.items()}, flush=True)
    for (target, method), values in figures.items():
        print(f"{target:10} {method:12} {np.mean(values):.1f} +- {np.std(values, ddof=min(1, len(values) - 1)):.1f}")


if __name__ == "__main__":
    main()
