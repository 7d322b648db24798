"""RNA written out again: modulation, controller, signals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, SourceSamples
from uda_testtime.rna import RNA, FiLM
from uda_testtime.warmup import row_domain

from uda.errors import UDAError


@pytest.mark.parametrize(("scale", "loops"), [(True, 1), (False, 1), (True, 2)])
def test_rna_is_its_formula(scale, loops, net, batches, source, ready):
    a = ready(RNA(scale=scale, loops=loops, epochs=2, lr=0.05, hidden=5))
    model, (film,) = net().requires_grad_(False), [m for m in a.net.modules() if isinstance(m, FiLM)]
    (w1, b1, w2, b2), (w, b) = a.extra["controller"].parameters(), film.coefficients.parameters()
    assert w.abs().max() > 0

    def adapted(x, gamma, beta):
        h = model[1](model[0](x)) * (1 + gamma) + beta
        return model[3](h.clamp_min(0))

    def naive(x):
        z = model(x)
        for _ in range(loops):
            p = z.softmax(1)
            seen = torch.cat([p, -(p * p.log()).sum(1, keepdim=True) / np.log(3)], 1)
            e = ((seen @ w1.T + b1).clamp_min(0) @ w2.T + b2).clamp_min(0)
            out = e @ w.T + b
            z = adapted(x, out[:, 6:] if scale else 0, out[:, :6])
        return z

    for x in batches(2):
        assert torch.allclose(a(x), naive(x))
    g = torch.Generator()
    g.set_state(a.generator.get_state())
    x, y = source().x, source().y
    shifted = row_domain(x, g, int(torch.randint(5, (), generator=g)))
    wanted = -sum(float(naive(shifted).softmax(1)[i, y[i]].log()) for i in range(48)) / 48
    assert float(a.method.warm_up_loss(a, x, y)) == pytest.approx(wanted)
    assert not a.parameters
    assert repr(a.export()) == repr(net())


@pytest.mark.parametrize("signal", ["entropy", "prototypes"])
def test_rna_learns_and_uses_a_coarse_class_given_beside_the_batch(signal, source, ready):
    a = ready(RNA(epochs=60, lr=0.03, groups=[0, 1, 1], batch_size=48, signal=signal))
    base, x, y = a.net, source().x, source().y
    plain, hinted = a(x), a(x, side={"coarse": (y > 0).long()})

    def loss(z):
        return float(nn.functional.cross_entropy(z, y))

    assert loss(plain) < loss(base(x))
    assert loss(hinted) < loss(plain) - 0.1
    some = torch.where(torch.arange(48) < 10, (y > 0).long(), -1)
    mixed = a(x, side={"coarse": some})
    assert torch.allclose(mixed[:10], hinted[:10])
    assert torch.allclose(mixed[10:], plain[10:])
    for bad in (torch.zeros(3, dtype=torch.long), torch.full((48,), 2)):
        with pytest.raises(UDAError, match="coarse"):
            a(x, side={"coarse": bad})


def test_rna_on_images_and_what_it_refuses(images, ready, source):
    a = Adapter(images(), RNA(epochs=1, batch_size=4))
    assert [n for n, m in a.net.named_modules() if isinstance(m, FiLM)] == ["1.body.1", "2.body.1"]
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a.prepare(SourceSamples(x, torch.arange(6) % 3))
    assert not torch.equal(a(x), images()(x))
    assert torch.allclose(a(x)[:1], a(x[:1]), atol=1e-6)  # each sample by itself
    for make in (lambda: RNA(signal="loss"), lambda: RNA(domains=0), lambda: RNA(groups=[0, 2])):
        with pytest.raises(UDAError, match="not"):
            make()
    with pytest.raises(UDAError, match="names 2 classes, the model has 3"):
        Adapter(images(), RNA(groups=[0, 1]))
    with pytest.raises(UDAError, match="no normalisation and no hidden layer"):
        Adapter(nn.Sequential(nn.Linear(4, 3)), RNA())
    with pytest.raises(UDAError, match="name the group"):
        ready(RNA(epochs=1))(source().x, side={"coarse": source().y})
