"""Peak memory of the methods for unknown classes on a large target, beyond its features.

    python tests/benchmarks/universal_memory.py [--samples 50000] [--width 256]

Each measurement has a process of its own: features of the target (and of a source of equal size) are made, the
resident memory is read, the step is run, and the peak above it is printed. DCC's k-means and matching, MemSPM's
addressing of the whole target, and DANCE's neighbourhood of one batch, with its gradient.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch


def resident() -> float:
    """Resident memory now, MiB."""
    with open("/proc/self/statm") as text:
        return int(text.read().split()[1]) * resource.getpagesize() / 2**20


def measure(what: str, samples: int, width: int) -> None:
    """Run one step and print its peak."""
    from sklearn.cluster import KMeans
    from uda_universal.dance import neighbourhood_entropy
    from uda_universal.matching import match
    from uda_universal.memspm import address, read

    torch.manual_seed(0)
    target = torch.randn(samples, width)
    classes, batch = 65, 36
    KMeans(2, n_init=1).fit(target[:100].numpy())  # imports and thread pools are no part of it
    source = torch.randn(samples, width) if what == "DCC" else None
    memory = torch.randn(500, 40, width) if what == "MemSPM" else None
    before, start = resident(), time.perf_counter()
    if what == "DCC":
        match(source, torch.arange(samples) % classes, target, classes, [2 * classes])
    elif what == "MemSPM":
        with torch.no_grad():
            torch.cat([read(memory, *address(part, memory, 5, 0.05)) for part in target.split(1024)])
    else:
        features = target[:batch].clone().requires_grad_()
        filled = torch.ones(samples, dtype=torch.bool)
        neighbourhood_entropy(features, torch.randn(classes, width), target, torch.arange(batch), filled).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {what} | {peak - before:.0f} MiB | {seconds:.1f} |", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--only", choices=("DCC", "MemSPM", "DANCE"))
    args = parser.parse_args()
    if args.only:
        return measure(args.only, args.samples, args.width)
    title = f"{args.samples} samples of {args.width} features"
    print(f"| {title} | peak beyond the features | seconds |\n|---|---|---|", flush=True)
    for what in ("DCC", "MemSPM", "DANCE"):
        sizes = ["--samples", str(args.samples), "--width", str(args.width)]
        subprocess.run([sys.executable, __file__, *sizes, "--only", what], check=True)
    return None


if __name__ == "__main__":
    main()
