"""What no method may do silently: odd models, precisions, modes and inputs work, or are refused by name."""

from __future__ import annotations

import inspect
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from uda_testtime import Adapter, Method, SourceSamples
from uda_testtime.registry import methods

from uda.errors import UDAError

#: Less of what costs time, where a method has it.
QUICK = {"views": 2, "warmup": 0, "epochs": 1, "batch_size": 24, "steps": 1, "support": 8, "heads": 2}


def quick(name: str, **more: float) -> Method:
    kind = methods()[name]
    known = inspect.signature(kind).parameters
    return kind(**{k: v for k, v in (QUICK | more).items() if k in known})


def small(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), *([nn.BatchNorm1d(6)] if norm else []), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).eval()


def samples() -> SourceSamples:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))
    return SourceSamples(x, torch.arange(48) % 3, torch.arange(48) % 2)


def made(name: str, net: nn.Module, **more: float) -> Adapter:
    a = Adapter(net, quick(name, **more))
    a.prepare(samples())
    return a


@pytest.fixture(params=sorted(methods()))
def name(request):
    return request.param


def test_modes_precisions_and_inputs(name):
    a, g = made(name, small()), torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, generator=g)
    with torch.inference_mode():  # as Lightning's predict loop
        assert a(x + 0).isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            assert a(x).isfinite().all()
    with torch.autocast("cpu", torch.float16), pytest.raises(UDAError, match="bfloat16"):
        a(x)
    before = a.snapshot()
    for bad, told in ((x[:0], "empty"), (x * float("nan"), "NaN"), (x / 0, "NaN or infinite"), (x[:, :3], "shape")):
        with pytest.raises(UDAError, match=told):
            a(bad)
    after = a.snapshot()  # a refused batch has changed nothing
    assert all(torch.equal(p, q) for p, q in zip(before["parameters"], after["parameters"], strict=True))
    assert before["counts"] == after["counts"]


class Cosine(nn.Module):
    """BatchNorm and a classifier that is no Linear."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.BatchNorm1d(4), nn.Parameter(torch.eye(3, 4))

    def forward(self, x):
        return self.norm(x) @ self.weight.T


class Fixed(nn.Module):
    """No parameter."""

    def forward(self, x):
        return x[:, :3]


NORM = {"BNStatistics", "Core", "EATA", "ETA", "LSA", "NOTE", "ROID", "RoTTA", "SANTA", "SAR", "TENT"}
HEAD = {"AdaContrast", "BECoTTA", "LAME", "LSA", "MetaDMoE", "RMT", "RNA", "SANTA", "VDP", "ViDA"}
#: By what a model lacks: the model, and who refuses it.
LACKS = {
    "normalisation": (lambda: small(norm=False), NORM), "a Linear": (lambda: Cosine().eval(), HEAD),
    "parameters": (Fixed, {*methods()} - {"Source"}), "nothing": (small, set()),
}  # fmt: skip


def test_models_without_the_layers_that_a_method_needs_are_refused_by_name_and_no_others(name):
    """Nothing in between: no error from inside of a method, no logits that are not finite."""
    for make, refused in LACKS.values():
        if name in refused:
            with pytest.raises(UDAError, match="model has no"):
                made(name, make())
        else:
            a = made(name, make())
            out = [a(x) for x in torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))]
            assert all(z.shape == (8, 3) and z.isfinite().all() for z in out)


def test_the_scored_forward_is_the_one_that_is_told(name):
    """Before the update: what a fresh adapter predicts without one. The page's table says the same of each method."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    a, b = (made(name, small(), threshold=0.0, margin=9.0) for _ in range(2))  # no averages over views, all samples
    told, out, before = a.method.scored, a(x), b._plain(x)
    if name != "LAME":  # corrects what it predicts
        assert torch.allclose(out, before, atol=1e-6) == ("after" not in told)
    if "after" in told or name in ("TENT", "EATA", "SAR", "ROID", "RMT", "CoTTA"):
        assert a.updates > 0
    page = Path(__file__).parents[3] / "docs" / "methods" / "testtime.md"
    if name != "Source" and page.is_file():
        row = next(line for line in page.read_text().splitlines() if line.startswith("| [") and f"`{name}`" in line)
        assert ("after" in row.split("|")[-2]) == ("after" in told)


def _two_ranks(rank: int, port: int) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, kind in methods().items():
        if kind.averages:
            assert Adapter(small(), quick(name))(torch.randn(8, 4)).shape == (8, 3)
        else:
            with pytest.raises(UDAError, match=f"{name} would drift apart on several processes"):
                Adapter(small(), quick(name))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_refused_unless_nothing_is_kept_between_batches():
    averages = {n for n, kind in methods().items() if kind.averages}
    assert {"Source", "BNStatistics", "LAME"} <= averages
    assert not {"TENT", "CoTTA", "RoTTA"} & averages
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_two_ranks, (port,), 2, start_method="fork")  # a spawned process imports torch anew
