"""What a test-time method costs a batch, beside plain inference: the table of docs/benchmarks/testtime_cost.md.

    python tests/benchmarks/testtime_cost.py [--page docs/benchmarks/testtime_cost.md] [--rounds 4] [--methods ...]

All methods run in turn, a batch of 16 each, for some rounds, so that a drift of the machine's speed touches all of
them; four rounds are the 64 samples after which the methods with a memory update once. Forwards and backwards are those
of the whole network, of its copies too, in batches' worth of samples: 32 views of a batch are 32. Memory is what a
method keeps between two batches and what it takes at most within one, in sizes of the model and of plain inference's
need.
"""

from __future__ import annotations

import argparse
import inspect
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from testtime import METHODS, SUITES, Suite
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from uda_testtime import Adapter, SourceSamples
from uda_testtime.registry import method_class, methods
from uda_testtime.streams import Stream

from uda.errors import UDAError

BATCH, WARM_UP = 16, 3  # the batch whose peak is taken is the eighth: memories bring their second update
#: A short phase before the stream: what a batch costs does not depend on its length.
SHORT = {"warmup": 256, "epochs": 1, "steps": 1}
BEGIN, END = "<!-- testtime_cost -->", "<!-- /testtime_cost -->"


class Counted(nn.Sequential):
    """A network that counts its passes, and those of its copies, in samples."""

    forwards = backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [B, C]``."""
        out = super().forward(x)
        Counted.forwards += len(x)
        if out.requires_grad:
            out.register_hook(lambda g: setattr(Counted, "backwards", Counted.backwards + len(g)))
        return out


class Peak(TorchDispatchMode):
    """Bytes of tensors made inside, at most at one time; what an operation uses within itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Note the storages of what comes out."""
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (s := t.untyped_storage())._cdata not in given and s not in self._known:
                self._known[s] = s.nbytes()
                self.now += s.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(s, self._gone, s.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.now -= size


def adapter_of(suite: Suite, name: str) -> Adapter:
    """Made ready with a few source samples; two domains, as some methods want several."""
    kind, arguments = METHODS.get(name, (name, {}))
    known = inspect.signature(method_class(kind)).parameters
    method = method_class(kind)(**{k: v for k, v in SHORT.items() if k in known}, **arguments)
    a = Adapter(suite.net, method, **suite.scale)
    x, y = (v[:256] for v in suite.source)
    a.prepare(SourceSamples(x, y, torch.arange(len(x)) % 2))
    return a


def kept(a: Adapter) -> int:
    """Bytes that an adapter holds between batches beyond the network itself: copies, averages, memories, the start."""
    own = {p.untyped_storage()._cdata for p in [*a.net.parameters(), *a.net.buffers()]}
    optimizer = a.optimizer.state_dict()["state"] if a.optimizer else {}
    held = [*a.extra.state_dict().values(), a.state, a.prepared, optimizer, a._start]
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tree_leaves(held)
             if isinstance(t, Tensor)}  # fmt: skip
    return sum(size for key, size in found.items() if key not in own)


def measured(chosen: list[str], rounds: int, cache: Path) -> dict[str, dict[str, Any]]:
    """Figures by method, of batches of a CIFAR stream in the small network with BatchNorm."""
    suite = SUITES["cifar_bn"](cache)
    suite.net = Counted(*suite.net).eval()  # parameters keep their names
    stream = Stream(suite.shifts, "mixed", BATCH, 0)
    batches = [stream[i].x for i in range(WARM_UP + rounds + 1)]
    adapters: dict[str, Adapter] = {}
    for name in ["source", *(n for n in chosen if n != "source")]:
        try:
            adapters[name] = adapter_of(suite, name)
        except UDAError as error:
            print(f"{name}: {error}")
    out = {name: {"seconds": [], "needs": a.method.needs} for name, a in adapters.items()}
    for i, x in enumerate(batches[:-1]):
        for name, a in adapters.items():
            Counted.forwards = Counted.backwards = 0
            start = time.process_time()  # of one thread; other processes do not count
            a(x)
            if i >= WARM_UP:
                out[name]["seconds"].append(time.process_time() - start)
                counts = out[name].setdefault("counts", [])
                counts.append((Counted.forwards / len(x), Counted.backwards / len(x)))
    model = sum(t.numel() * t.element_size() for t in suite.net.state_dict().values())
    for name, a in adapters.items():
        out[name]["kept"] = kept(a) / model
        with Peak() as peak:
            a(batches[-1])
        out[name]["peak"] = peak.most
    return out


def table(found: dict[str, dict[str, Any]]) -> str:
    """Rows by rising time."""
    base = found["source"]
    rows = []
    for name, row in found.items():
        ratio = sum(row["seconds"]) / sum(base["seconds"])
        forwards, backwards = (statistics.mean(c[i] for c in row["counts"]) for i in (0, 1))
        rows.append((ratio, f"| {name} | {forwards:.3g} | {backwards:.3g} | {ratio:.1f} | {row['kept']:.2f} | "
                            f"{row['peak'] / base['peak']:.1f} | {row['needs']} |"))  # fmt: skip
    head = ("| method | forwards | backwards | time | kept, models | peak in a batch | needs of the source |\n"
            "|---|---:|---:|---:|---:|---:|---|\n")  # fmt: skip
    return head + "\n".join(text for _, text in sorted(rows)) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, help="put the table between its marks there")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "uda_testtime_benchmark")
    named = {kind for kind, _ in METHODS.values()}
    every = [*METHODS, *(n for n in methods() if n not in named)]
    parser.add_argument("--methods", nargs="+", default=every, choices=every)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.cache.mkdir(parents=True, exist_ok=True)
    text = table(measured(args.methods, args.rounds, args.cache))
    print(text)
    if args.page:
        page = args.page.read_text()
        before, _, rest = page.partition(BEGIN)
        args.page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
