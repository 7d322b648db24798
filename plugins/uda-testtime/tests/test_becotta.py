"""BECoTTA written out again in loops: experts, routing, warm-up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, SourceSamples
from uda_testtime.becotta import BECoTTA
from uda_testtime.mode import MoDE, mutual_information
from uda_testtime.warmup import pixel_domain, row_domain

from uda.errors import UDAError


def gelu(x: float) -> torch.Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def experts_by_loops(t, y, domains, top, noise=None):
    """Output and ``logits.softmax(1)`` of a mixture for rows ``y``, sample by sample and expert by expert."""
    rows, routed, count = [], [], t["up"].shape[0]
    for b, row in enumerate(y):
        out = row @ t["router"][domains[b]]
        logits = [out[e] if noise is None else out[e] + noise[b, e] * ((1 + out[count + e].exp()).log() + 0.01)
                  for e in range(count)]  # fmt: skip
        chosen = sorted(range(count), key=lambda e: -float(logits[e].detach()))[:top]
        bottom = sum(logits[e].exp() for e in chosen)
        for e in chosen:
            hidden = gelu(y[b] @ t["down"][:, e] + t["down_bias"][e])
            row = row + logits[e].exp() / bottom * (hidden @ t["up"][e] + t["up_bias"][e])
        rows.append(row)
        routed.append(torch.stack([v.exp() for v in logits]) / sum(v.exp() for v in logits))
    return torch.stack(rows), torch.stack(routed)


def rest_of(model, h):
    h = (h - model[1].running_mean) / (model[1].running_var + 1e-5).sqrt() * model[1].weight + model[1].bias
    return h.clamp_min(0) @ model[3].weight.T + model[3].bias


def test_becotta_is_its_formula(net, batches, ready):
    given = {"experts": 3, "top": 2, "rank": 2, "domains": 3}
    a = ready(BECoTTA(lr=0.1, optimizer="sgd", margin=0.9, restore=0.0, epochs=3, source_lr=0.05, **given))
    model, velocity, places, kept = net().requires_grad_(False), {}, [], 0
    t = {n.removeprefix("0."): p.detach().clone().requires_grad_() for n, p in a.net.named_parameters()
         if n.startswith("0.") and ".layer." not in n}  # fmt: skip
    assert set(t) == {"router", "down", "down_bias", "up", "up_bias"}
    assert t["up"].abs().max() > 0
    for x in batches(3):
        places += (domains := a.extra["discriminator"](x).argmax(1).tolist())
        z = rest_of(model, experts_by_loops(t, model[0](x), domains, 2)[0])
        assert torch.allclose(a(x), z)
        p = z.softmax(1)
        h = [-sum(p[i, c] * p[i, c].log() for c in range(3)) for i in range(16)]
        rows = [v for v in h if float(v.detach()) < 0.9 * np.log(3)]
        kept += len(rows)
        for n, g in zip(t, torch.autograd.grad(sum(rows) / len(rows), list(t.values())), strict=True):
            assert g.abs().max() > 0, n  # routers learn too
            velocity[n] = 0.9 * velocity.get(n, 0) + g
            t[n].data -= 0.1 * velocity[n]
    assert 0 < kept < 48
    assert len(set(places)) > 1
    assert all(torch.allclose(a.net.get_parameter(f"0.{n}"), p) for n, p in t.items())


def test_becotta_warms_up_on_its_formula(net, source):
    a = Adapter(net(), BECoTTA(experts=3, top=2, rank=2, domains=3, synergy=0.7, domain_weight=0.3))
    model, (layer,) = net().requires_grad_(False), [m for m in a.net.modules() if isinstance(m, MoDE)]
    g = torch.Generator()
    g.set_state(a.generator.get_state())
    with torch.no_grad():
        layer.up.normal_(generator=torch.Generator().manual_seed(1))
    x, y = source().x[:8], source().y[:8]
    loss = a.method.warm_up_loss(a, x, y)
    every = torch.cat([row_domain(x, g, d) for d in range(3)])
    domains = [d for d in range(3) for _ in range(8)]
    t = {n: p.detach() for n, p in layer.named_parameters() if ".layer" not in n}
    out, routed = experts_by_loops(t, model[0](every), domains, 2, torch.randn(24, 3, generator=g))
    z, d, joint = rest_of(model, out), a.extra["discriminator"](every), np.zeros((3, 3))
    for i, k in enumerate(domains):
        joint[k] += routed[i].numpy() / 24
    information = sum(
        joint[k, e] * np.log(joint[k, e] / joint[k].sum() / joint[:, e].sum()) for k in range(3) for e in range(3)
    )
    log_p, log_d = z.softmax(1).log(), d.softmax(1).log()
    wanted = -sum(float(log_p[i, y[i % 8]]) + 0.3 * float(log_d[i, domains[i]]) for i in range(24)) / 24
    assert float(loss.detach()) == pytest.approx(float(wanted - 0.7 * information))
    assert float(mutual_information(torch.eye(3))) == pytest.approx(np.log(3))  # an expert a domain
    assert float(mutual_information(torch.ones(3, 3) / 3)) == pytest.approx(0, abs=1e-6)


def test_becotta_learns_routing_that_the_released_code_does_not(net, source):
    for compat in (False, True):
        a = Adapter(net(), BECoTTA(epochs=20, source_lr=0.02, synergy=0.5, compat=compat))
        (layer,) = [m for m in a.net.modules() if isinstance(m, MoDE)]
        before, up = layer.router.clone(), layer.up.clone()
        a.prepare(source())
        assert torch.equal(layer.router, before) == compat
        assert not torch.equal(layer.up, up)
        assert torch.equal(layer.up[3], up[3]) == compat  # and its fourth expert is never asked


def test_becotta_on_images_and_what_it_refuses(images):
    a = Adapter(images(), BECoTTA(epochs=25, source_lr=0.01, batch_size=24, margin=2.0))
    assert [n for n, m in a.net.named_modules() if isinstance(m, MoDE)] == ["1", "2"]
    x = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a.prepare(SourceSamples(x, torch.arange(24) % 3))
    every = torch.cat([pixel_domain(x, torch.Generator().manual_seed(7), d) for d in range(4)])
    found = a.extra["discriminator"](every).argmax(1)
    assert (found == torch.arange(4).repeat_interleave(24)).double().mean() > 0.45  # of four domains
    start = [p.clone() for p in a.parameters]
    assert a(x).isfinite().all()
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters, start, strict=True))
    assert repr(a.export()) == repr(images())
    named = Adapter(images(), BECoTTA(layers=["0"], epochs=0))
    assert [n for n, m in named.net.named_modules() if isinstance(m, MoDE)] == ["0"]
    for make in (lambda: BECoTTA(domains=9), lambda: BECoTTA(top=5), lambda: Adapter(images(), BECoTTA(layers=["9"]))):
        with pytest.raises(UDAError, match=r"not 9|not 5|no layer '9'"):
            make()
    with pytest.raises(UDAError, match="no residual block and no hidden layer"):
        Adapter(nn.Sequential(nn.Linear(4, 3)), BECoTTA())
