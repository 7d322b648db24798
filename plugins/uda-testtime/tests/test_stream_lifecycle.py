"""Methods of teachers, memories and views along a stream: exact reset and resume, no effect at weight 0, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from uda_testtime import SAR, TENT, Adapter, BNStatistics, Source
from uda_testtime.adacontrast import AdaContrast
from uda_testtime.becotta import BECoTTA
from uda_testtime.core import Core
from uda_testtime.cotta import CoTTA
from uda_testtime.eata import EATA, ETA
from uda_testtime.lsa import LSA
from uda_testtime.memo import MEMO
from uda_testtime.meta_dmoe import MetaDMoE
from uda_testtime.note import NOTE
from uda_testtime.petal import PETAL
from uda_testtime.registry import methods
from uda_testtime.rmt import RMT
from uda_testtime.rna import RNA
from uda_testtime.roid import ROID
from uda_testtime.rotta import RoTTA
from uda_testtime.santa import SANTA
from uda_testtime.vdp import VDP
from uda_testtime.vida import ViDA

from uda.errors import UDAError

LIVELY = [
    TENT(lr=0.1), SAR(lr=0.1, margin=2.0), ETA(lr=0.1, margin=2.0, redundancy=2.0),
    EATA(beta=1.0, margin=2.0, redundancy=2.0), CoTTA(threshold=2.0, views=2, lr=0.1, momentum=0.9), ROID(lr=0.1),
    RMT(warmup=48, batch_size=24, lr=0.1), RoTTA(lr=0.1, capacity=9, every=10), MEMO(lr=0.1, views=3), Core(lr=0.1),
    SANTA(lr=0.1), PETAL(lr=0.1, views=2, threshold=2.0, batch_size=24, momentum=0.9),
    AdaContrast(lr=0.1, refine_after=20), NOTE(lr=0.1, capacity=9, every=10, epochs=1, batch_size=24),
    LSA("CoTTA", {"lr": 0.1, "views": 2, "threshold": 2.0}, "prior", steps=20, adapter_lr=0.05),
    VDP(lr=0.1, views=2, threshold=0.01),
    ViDA(lr=0.1, adapter_lr=0.1, views=2, momentum=0.9, adapter_momentum=0.8, epochs=1, source_lr=0.1),
    BECoTTA(lr=0.1, margin=2.0, epochs=2, source_lr=0.1), RNA(epochs=2, lr=0.1),
    MetaDMoE(support=20, batch_size=24, heads=3, epochs=1, expert_epochs=1, aggregator_epochs=1, inner_lr=0.5),
]  # fmt: skip


def test_no_method_is_left_out():
    assert {type(m).__name__ for m in LIVELY} == {*methods()} - {"Source", "BNStatistics", "LAME"}  # nothing is learned


@pytest.mark.parametrize("method", LIVELY, ids=lambda m: type(m).__name__)
def test_reset_and_resume_are_exact_and_the_generator_is_the_own(method, tmp_path, net, batches, ready):
    net()  # seeds the global generator, as each call below
    before = torch.get_rng_state()
    a = ready(method)
    first = [a(x) for x in batches()]
    end = a.snapshot()
    a.reset()
    base = Adapter(net(), Source()) if isinstance(method, RNA) else a  # RNA adapts each sample, and nothing else
    assert (base._plain(batches()[-1]) - first[-1]).abs().max() > 1e-6  # it does adapt
    a.reset()
    assert all(torch.equal(a(x), z) for x, z in zip(batches()[:2], first, strict=False))
    torch.save(a.snapshot(), tmp_path / "state.pt")
    b = ready(method)
    b.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(b(x), z) for x, z in zip(batches()[2:], first[2:], strict=True))
    again = b.snapshot()
    assert all(torch.equal(p, q) for p, q in zip(end["parameters"], again["parameters"], strict=True))
    assert all(torch.equal(v, again["extra"][n]) for n, v in end["extra"].items())
    b.reset()
    start = ready(method).snapshot()
    found = b.snapshot()
    assert all(torch.equal(p, q) for p, q in zip(start["parameters"], found["parameters"], strict=True))
    assert all(torch.equal(v, found["buffers"][n]) for n, v in start["buffers"].items())
    assert found["method"] == start["method"] == {}
    assert first[-1].dtype == torch.float64
    assert a(batches()[0][:1]).isfinite().all()  # a single sample
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        assert b.export()(batches()[0]).isfinite().all()


@pytest.mark.parametrize(
    ("method", "base"),
    [(EATA(weight=0, beta=5.0), BNStatistics()), (EATA(lr=0), BNStatistics()),
     (CoTTA(lr=0, threshold=0), BNStatistics()), (CoTTA(weight=0, threshold=0), BNStatistics()),
     (ROID(lr=0, correction="none"), BNStatistics()), (ROID(weight=0, correction="none"), BNStatistics()),
     (SANTA(lr=0), BNStatistics()), (SANTA(anchor=0, contrast=0), BNStatistics()), (Core(lr=0), BNStatistics(0.9)),
     (Core(weight=0), BNStatistics(0.9)), (RoTTA(lr=0, rate=0, every=8), Source()),
     (PETAL(lr=0, threshold=0), BNStatistics()), (AdaContrast(lr=0, statistics="source"), Source()),
     (ViDA(lr=0, adapter_lr=0, views=2, epochs=0), BNStatistics()), (ViDA(weight=0, views=2, epochs=0), BNStatistics()),
     (BECoTTA(lr=0, epochs=0), Source()), (BECoTTA(weight=0, epochs=0), Source()), (RNA(lr=0), Source()),
     (MEMO(lr=0, views=2, source_weight=1.0), Source()), (NOTE(lr=0, rate=0, epochs=0, every=10), Source()),
     (MetaDMoE(inner_lr=0, epochs=0, support=8, heads=3, expert_epochs=1, aggregator_epochs=0), Source())],
)  # fmt: skip
def test_without_effect_it_is_the_base_prediction(method, base, net, batches, ready):
    a, b = ready(method), Adapter(net(), base)
    for x in batches():
        one_by_one = isinstance(method, MEMO)
        wanted = torch.cat([b(v[None]) for v in x]) if one_by_one else b(x)
        assert torch.equal(a(x), wanted)


def test_rmt_without_effect_is_twice_the_base(net, batches, ready):
    for method in (RMT(lr=0, warmup=0), RMT(weight=0, contrast=0, replay=0, warmup=0)):
        a, b = ready(method), Adapter(net(), BNStatistics())
        assert all(torch.equal(a(x), 2 * b(x)) for x in batches(3))


@pytest.mark.parametrize("method", [ROID(lr=0.05, momentum=1.0), Core(lr=0.02), EATA(margin=2.0, redundancy=2.0),
                                    BECoTTA(lr=0.02, margin=2.0)])  # fmt: skip
def test_predictions_grow_more_certain(method, batches, ready):
    a, x = ready(method), batches()[0]
    first = torch.special.entr(a(x).softmax(1)).sum(1).mean()
    for _ in range(30):
        last = a(x)
    assert torch.special.entr(last.softmax(1)).sum(1).mean() < first


def test_settings_that_do_not_exist_are_refused():
    for make in (lambda: CoTTA(loss="mse"), lambda: ROID(correction="sum"), lambda: RMT(duplicates="some"),
                 lambda: PETAL(share=1.0), lambda: AdaContrast(statistics="batch")):  # fmt: skip
        with pytest.raises(UDAError, match="not"):
            make()
    bare = nn.Sequential(nn.Linear(4, 3))
    for method in (RoTTA(), SANTA()):
        with pytest.raises(UDAError, match="no normalisation"):
            Adapter(bare, method)
