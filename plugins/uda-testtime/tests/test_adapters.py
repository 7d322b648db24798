"""Where parts go in a net, pseudo-domains of its source, and ViDA's adapters, written out again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, SourceSamples
from uda_testtime.becotta import BECoTTA
from uda_testtime.layers import hidden_layers, residual_blocks, told, width
from uda_testtime.rna import RNA
from uda_testtime.surgery import norm_layers
from uda_testtime.vida import ViDA, VidaLayer, disagreement
from uda_testtime.warmup import PIXELS, ROWS, pixel_domain, row_domain

from uda.errors import UDAError


def soft(z):
    return z.exp() / z.exp().sum(1, keepdim=True)


class SelfAttention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.transpose(1, 2)).softmax(-1) @ v)


class Tokens(nn.Module):
    """Attention over rows cut into tokens of two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.norm, self.head = (
            nn.Linear(2, 6), SelfAttention(6), nn.LayerNorm(6), nn.Linear(6, 3)
        )  # fmt: skip

    def forward(self, x):
        t = self.embed(x.unflatten(1, (-1, 2)))
        return self.head(self.norm(t + self.attention(t)).mean(1))


def test_layers_are_found_by_their_kind(images):
    net = images()
    assert list(hidden_layers(net, "5")) == ["0", "1.body.0", "1.skip", "2.body.0", "2.skip"]
    assert list(residual_blocks(net, "5")) == ["1", "2"]
    assert list(residual_blocks(net, "2.skip")) == ["1"]
    assert list(norm_layers(net)) == ["1.body.1", "2.body.1"]
    assert [width(m) for m in (net[0], net[1], net[2], nn.LayerNorm([3, 5]), nn.BatchNorm1d(7), nn.ReLU())] == [
        4, 4, 6, 5, 7, 0
    ]  # fmt: skip
    transformer = nn.Sequential(nn.Linear(2, 4), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
    assert list(hidden_layers(transformer, None)) == ["0"]  # its fast path reads weights without a call


@pytest.mark.parametrize("kind", range(len(PIXELS)))
def test_pseudo_domains_are_of_the_given_generator(kind):
    before = torch.get_rng_state()
    for make, x in ((pixel_domain, torch.linspace(0, 1, 2 * 64).view(2, 1, 8, 8)), (row_domain, torch.randn(5, 6))):
        if make is row_domain:
            before = torch.get_rng_state()
        one, same, other = (make(x, torch.Generator().manual_seed(s), kind) for s in (0, 0, 1))
        assert torch.equal(one, same)
        assert torch.equal(one, other) == torch.equal(one, x) == (kind == 0)
        assert make is row_domain or 0 <= one.min() <= one.max() <= 1
    assert torch.equal(torch.get_rng_state(), before)
    assert len(ROWS) == len(PIXELS)



def test_disagreement_is_its_formula():
    z = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0)).double()
    p = np.exp(z.numpy()) / np.exp(z.numpy()).sum(2, keepdims=True)
    for b in range(5):
        centre = sum(p[v, b] for v in range(4)) / 4
        wanted = np.sqrt(sum(((p[v, b] - centre) ** 2).sum() for v in range(4)) / 4)
        assert float(disagreement(z)[b]) == pytest.approx(wanted)
    assert torch.allclose(disagreement(z, "batch"), torch.tensor(0.1 * np.var(z.numpy(), 0, ddof=1).mean()))
    far = disagreement(100 * torch.eye(3)[:, None].repeat(1, 2, 1))
    assert (far < 1).all()  # 1 - u stays positive
    assert (disagreement(100 * z, "batch") == 1).all()


@pytest.mark.parametrize("layer", [
    nn.Linear(5, 7), nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.Conv2d(3, 4, 1, padding_mode="reflect"),
])  # fmt: skip
def test_adapters_beside_a_layer_are_matrices_of_their_rank(layer):
    torch.manual_seed(0)
    x = torch.randn(2, 5) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 6, 6)
    beside = VidaLayer(layer, 1, 128)
    assert torch.equal(beside(x), layer(x))
    with torch.no_grad():
        for down, up in (beside.low, beside.high):
            up.weight.normal_()
            down.weight.normal_()
    largest = min(layer.weight.shape[0], layer.weight[0].numel())
    assert [len(beside.low[0].weight), len(beside.high[0].weight)] == [1, largest]
    call = nn.functional.linear if x.dim() == 2 else lambda x, w: layer._conv_forward(x, w, None)
    parts = []
    for down, up in (beside.low, beside.high):
        w = torch.zeros_like(layer.weight)
        for o in range(w.shape[0]):
            for r in range(down.weight.shape[0]):
                w[o] += up.weight[o, r].reshape(()) * down.weight[r]
        parts.append(call(x, w))
    for b, (low, high) in enumerate(((0.7, 1.3), (1.1, 0.9))):
        scales = torch.tensor([0.7, 1.1]), torch.tensor([1.3, 0.9])
        with told(VidaLayer, beside, low_scale=scales[0], high_scale=scales[1]):
            found = beside(x)
        assert torch.allclose(found[b], (layer(x) + low * parts[0] + high * parts[1])[b], atol=1e-5)
    whole = beside(x)  # outside, both count 1
    beside.fold()
    assert torch.allclose(layer(x), whole, atol=1e-5)


def test_vida_is_its_formula(net, batches, ready):
    given = {"lr": 0.1, "adapter_lr": 0.3, "optimizer": "sgd", "views": 3, "threshold": 0.02, "restore": 0.0}
    a = ready(ViDA(**given, momentum=0.7, adapter_momentum=0.6, epochs=2, source_lr=0.1, high_rank=4, batch_size=48))
    model = net()
    fast = {n: p.detach().clone().requires_grad_() for n, p in a.net.named_parameters()}
    assert fast["0.high.1.weight"].abs().max() > 0  # the warm-up moved the adapters alone
    assert all(torch.equal(fast[n], p) for n, p in (("0.layer.weight", model[0].weight), ("3.bias", model[3].bias)))
    slow, velocity = {n: p.detach().clone() for n, p in fast.items()}, {}

    def forward(t, x, low, high):
        h = x @ t["0.layer.weight"].T + t["0.layer.bias"]
        for part, scale in (("low", low), ("high", high)):
            h = h + scale[:, None] * (x @ t[f"0.{part}.0.weight"].T @ t[f"0.{part}.1.weight"].T)
        h = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * t["1.norm.weight"] + t["1.norm.bias"]
        return h.clamp_min(0) @ t["3.weight"].T + t["3.bias"]

    g, one, seen = torch.Generator(), torch.ones(16).double(), []
    for x in batches(3):
        g.set_state(a.generator.get_state())
        views = [x + 0.1 * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=g).to(x)
                 for _ in range(3)]  # fmt: skip
        p = torch.stack([soft(forward(slow, v, one, one)) for v in views])
        u = ((p - p.mean(0)) ** 2).sum(2).mean(0).sqrt()
        seen.append(u >= 0.02)
        low, high = torch.where(u >= 0.02, 1 - u, 1 + u), torch.where(u >= 0.02, 1 + u, 1 - u)
        target = forward(slow, x, low, high)
        assert torch.allclose(a(x), target)
        loss = -(soft(target) * soft(forward(fast, x, low, high)).log()).sum(1).mean()
        for (n, q), d in zip(fast.items(), torch.autograd.grad(loss, list(fast.values())), strict=True):
            velocity[n] = 0.9 * velocity.get(n, 0) + d
            own = ".low." in n or ".high." in n
            q.data -= (0.3 if own else 0.1) * velocity[n]
            slow[n] = (0.6 if own else 0.7) * slow[n] + (0.4 if own else 0.3) * q.detach()
    assert 0 < torch.cat(seen).sum() < 48  # both sides of the threshold
    assert all(torch.allclose(fast[n], p) for n, p in a.net.named_parameters())
    assert all(torch.allclose(slow[n], p) for n, p in a.extra["teacher"].copies[0].named_parameters())


def test_vida_sits_at_attention_where_there_is_any_and_folds_into_the_model():
    torch.manual_seed(0)
    model = Tokens().eval()
    x, y = torch.randn(24, 4), torch.arange(24) % 3
    a = Adapter(model, ViDA(lr=0.01, adapter_lr=0.1, views=0, restore=0.0, epochs=2, source_lr=0.1))
    assert [n for n, m in a.net.named_modules() if isinstance(m, VidaLayer)] == ["attention.qkv", "attention.proj"]
    a.prepare(SourceSamples(x, y))
    assert not torch.equal(a.net(x), model(x))
    a(x[:1]), a(x)
    out = a.export()
    assert repr(out) == repr(model)
    assert torch.allclose(out(x), a.net(x), atol=1e-5)
    before = model(x)
    Adapter(model, ViDA()).export()
    assert torch.equal(model(x), before)


def test_vida_on_images_and_what_it_refuses(images):
    a = Adapter(images(), ViDA(lr=0.01, views=2, epochs=1, batch_size=4))
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    a.prepare(SourceSamples(x, torch.arange(6) % 3))
    assert a(x).isfinite().all()
    assert a(x[:1]).isfinite().all()
    for make in (lambda: ViDA(views=1), lambda: ViDA(uncertainty="pixel"), lambda: ViDA(low_rank=0)):
        with pytest.raises(UDAError, match="not"):
            make()
    with pytest.raises(UDAError, match="no Linear or Conv2d beside"):
        Adapter(nn.Sequential(nn.Linear(4, 3)), ViDA())


@pytest.mark.parametrize("method", [
    ViDA(epochs=1, views=2, lr=0.1), BECoTTA(epochs=1, margin=2.0, lr=0.1), RNA(epochs=1, signal="prototypes"),
])  # fmt: skip
def test_a_file_of_what_was_prepared_starts_the_same_stream(method, tmp_path, net, batches, ready):
    a = ready(method)
    a.save_prepared(tmp_path / "ready.pt")
    b = Adapter(net(), method, seed=9)
    with pytest.raises(UDAError, match="made ready"):
        b(batches()[0])
    b.load_prepared(tmp_path / "ready.pt")
    assert all(torch.equal(a(x), b(x)) for x in batches())
