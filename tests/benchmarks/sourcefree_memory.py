"""Memory beyond the features, and seconds of a core, of source-free methods on a target of 50,000 samples.

    python tests/benchmarks/sourcefree_memory.py [--samples 50000] [--features 256] [--classes 65] [--methods NRC ...]

Each method runs in a process of its own, on random features of a target in memory: its work at the start of an epoch,
then the search for the neighbours of ten batches of 64. The figures are the peak of the process's resident memory over
what it had with features and logits loaded, and processor time of its one thread, which other work does not lengthen.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from types import SimpleNamespace

import torch
from uda_sourcefree import NOTELA, NRC, SHOT, AaD
from uda_sourcefree.neighbours import nearest

MIB = 2**20
METHODS = {
    "SHOT": lambda: SHOT(),
    "NRC": lambda: NRC(neighbours=5, expanded=5),
    "AaD": lambda: AaD(neighbours=5),
    "NOTELA, online": lambda: NOTELA(trainable="all"),
    "NOTELA, offline": lambda: NOTELA(trainable="all", mode="offline"),
}


def peak() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(name: str, n: int, features: int, classes: int, out) -> None:
    """One method; puts MiB beyond the features, seconds of the start of an epoch, and of ten searches."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    pool = SimpleNamespace(features=torch.randn(n, features), logits=torch.randn(n, classes))
    plugin = METHODS[name]()
    model = SimpleNamespace(
        sizes={"target": n}, target_name="target", feature_dim=features, num_classes=classes, parameters=list,
        modules=list, multi_label=False, head=torch.nn.Linear(features, classes),
    )  # fmt: skip
    nearest(pool.features[:4], pool.features[:64], 2)  # what libraries allocate on first use
    before = peak()
    plugin.log_later = lambda **_: None
    plugin.build(model)
    start = time.process_time()
    plugin.refresh(model, SimpleNamespace(target=pool))
    refresh = time.process_time() - start
    start = time.process_time()
    for rows in torch.arange(640).split(64):
        target = SimpleNamespace(
            index=rows, features=pool.features[rows], logits=pool.logits[rows], pseudo=SimpleNamespace(y=None)
        )
        if hasattr(plugin, "pseudo_label"):
            plugin.pseudo_label(SimpleNamespace(target=target))
        else:
            plugin.refine_classifier(SimpleNamespace(target=target, progress=0.5))
    out.put((peak() - before, refresh, time.process_time() - start))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--classes", type=int, default=65)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    size = args.samples * (args.features + args.classes) * 4 / MIB
    print(f"{args.samples} samples: features and logits are {size:.0f} MiB")
    print("| method | MiB beyond them | start of an epoch, s | a step, ms |\n|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for name in args.methods:
        out = spawn.Queue()
        process = spawn.Process(target=measure, args=(name, args.samples, args.features, args.classes, out))
        process.start()
        memory, refresh, steps = out.get()
        process.join()
        print(f"| {name} | {memory:.0f} | {refresh:.2f} | {100 * steps:.0f} |")


if __name__ == "__main__":
    main()
