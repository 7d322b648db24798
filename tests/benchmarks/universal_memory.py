"""Peak memory of whole runs of the methods for unknown classes on a large target, beyond its features.

    python tests/benchmarks/universal_memory.py [--samples 50000] [--width 256] [--epochs 2] [--methods DCC UniOT ...]

Each method has a process of its own: rows of features of source and target (UniAM: images of 8 x 8) are made, the
resident memory is read, and a run of a few steps with its looks at the whole target and the evaluation afterwards is
made. The figure is the peak above what was resident before; in it are copies that the framework keeps for all methods,
which the first row shows by itself. Seconds are of one core.
"""

from __future__ import annotations

import argparse
import logging
import resource
import subprocess
import sys
import time
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

CLASSES, PRIVATE, BATCH, STEPS = 65, 10, 36, 6
COSINE: dict[str, Any] = {"head": "cosine"}
#: Plugin, its arguments, further arguments of the model. Few (numbers of) clusters, where only seconds grow with them.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "source-only, Reject": ("Reject", {"split": True}, {}),
    "DCC": ("DCC", {"starts": 1, "step": 65, "max_search": 2}, {}),
    "MemSPM": ("MemSPM", {"items": 500, "subs": 40, "starts": 1, "step": 65, "max_search": 2}, {}),
    "DANCE": ("DANCE", {}, COSINE),
    "UniOT": ("UniOT", {"warmup": 0, "clusters": 150, "fill": 4000}, COSINE),
    "PPOT": ("PPOT", {"warmup": 0.0}, {}),
    "OVANet": ("OVANet", {}, {}),
    "MLNet": ("MLNet", {"every": 0.5}, {}),
    "UAN": ("UAN", {"threshold": None}, {}),
    "CMU": ("CMU", {}, {}),
    "UniAM": ("UniAM", {}, {}),
    "GLC": ("GLC", {"target_classes": 8}, COSINE),
    "GLC, 65 clusters": ("GLC", {"target_classes": 65}, COSINE),
    "GLC++": ("GLCPlusPlus", {"target_classes": 8}, COSINE),
    "LEAD": ("LEAD", {"tsne": False}, COSINE),
    "OSBP": ("OSBP", {}, {}),
    "CoBRF": ("CoBRF", {}, {}),
}


def resident() -> float:
    """Resident memory now, MiB."""
    with open("/proc/self/statm") as text:
        return int(text.read().split()[1]) * resource.getpagesize() / 2**20


def rows(n: int, shape: tuple[int, ...], classes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy class templates ``[n, *shape]`` in [0, 1] and their classes ``[n]``."""
    templates = torch.rand(CLASSES + PRIVATE, *shape, generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(seed)
    y = classes[torch.randint(0, len(classes), (n,), generator=draw)]
    noise = torch.rand(n, *shape, generator=draw)
    return noise.mul_(0.4).add_(templates[y], alpha=0.6), y


def measure(name: str, samples: int, width: int, epochs: int) -> None:
    """Run one method and print its peak."""
    import lightning as L
    from sklearn.cluster import KMeans

    import uda
    from uda.discovery import registry

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plugin, options, given = METHODS[name]
    shape = (1, 8, 8) if name == "UniAM" else (width,)
    source = torch.utils.data.TensorDataset(*rows(samples, shape, torch.arange(CLASSES), 1))
    target = torch.utils.data.TensorDataset(*rows(samples, shape, torch.arange(40, CLASSES + PRIVATE), 2))
    free = plugin in ("GLC", "GLCPlusPlus", "LEAD")
    names = {"known": [str(c) for c in range(CLASSES)]}
    data = uda.DataModule.from_datasets(
        None if free else source, target.tensors[0] if free else target, setting=None if free else "universal",
        classes=names if free else None, batch_size=BATCH, epoch_steps=STEPS,
    )  # fmt: skip
    data.setup("fit")
    tiny = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3}
    vit = partial(uda.nn.Timm, "vit_tiny_patch16_224", in_chans=1, model_kwargs=tiny)
    backbone = vit() if name == "UniAM" else "identity"
    model = uda.UDA(backbone, {"method": registry().get(plugin)(**options)}, bottleneck=width, **given)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    quiet = dict.fromkeys(off, False)
    trainer = L.Trainer(max_epochs=epochs, num_sanity_val_steps=0, accelerator="cpu", devices=1, **quiet)
    KMeans(2, n_init=1).fit(target.tensors[0][:100].flatten(1).numpy())  # imports and thread pools are no part of it
    before, start = resident(), time.process_time()
    trainer.fit(model, data)
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {name} | {peak - before:.0f} MiB | {seconds:.0f} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--only", choices=list(METHODS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        return measure(args.only, args.samples, args.width, args.epochs)
    title = f"{args.samples} samples of {args.width} features"
    print(f"| {title} | peak beyond them | seconds |\n|---|---|---|", flush=True)
    for name in args.methods:
        sizes = ["--samples", str(args.samples), "--width", str(args.width), "--epochs", str(args.epochs)]
        subprocess.run([sys.executable, __file__, *sizes, "--only", name], check=True)
    return None


if __name__ == "__main__":
    main()
