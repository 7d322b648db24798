"""What the adapter gives a method: preparation, added modules, views, randomness, surgery, export."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from uda_testtime import TENT, Adapter, Method, Source, SourceSamples
from uda_testtime.registry import method_class, methods
from uda_testtime.views import cotta_view

from uda.errors import UDAError


class Everything(Method):
    """Prototypes, a warm-up, a teacher, views, noise on the weights, and a memory."""

    needs, scored = "labels", "the teacher's before its update"

    def attach(self, a):
        a.add("teacher", a.copy())
        self._train(a)

    def _train(self, a):
        a.train_parameters(list(a.net.parameters()), "sgd", 0.05, nesterov=True)

    def prepare(self, a, source):
        for batch in source.batches(16, a.generator):
            a.update(nn.functional.cross_entropy(a.net(batch["x"]), batch["y"]))
        f = a.features(source.x)[0].detach()
        a.prepared["prototypes"] = torch.stack([f[source.y == c].mean(0) for c in range(3)])
        a.extra["teacher"].load_state_dict(a.net.state_dict())
        self._train(a)

    def step(self, a, x):
        target = a.extra["teacher"](x).softmax(1)
        features, logits = a.features(x)
        pull = (features - a.prepared["prototypes"][target.argmax(1)]).square().mean()
        noisy = a.net(a.view(x)).log_softmax(1)
        a.update(pull - (target * (noisy + logits.log_softmax(1))).sum(1).mean())
        with torch.no_grad():
            for p, q in zip(a.extra["teacher"].parameters(), a.net.parameters(), strict=True):
                p.lerp_(q, 0.1)
                q.add_(0.01 * a.rand_like(q))
        a.state.setdefault("memory", []).append(x[:1])
        return target.log()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def source() -> SourceSamples:
    x = torch.randn(48, 4, generator=torch.Generator().manual_seed(3))
    return SourceSamples(x, torch.arange(48) % 3)


def batches() -> list[torch.Tensor]:
    return list(torch.randn(6, 8, 4, generator=torch.Generator().manual_seed(1)))


def test_prepared_once_and_started_from_the_file(tmp_path):
    a, before = Adapter(net(), Everything(), seed=5), torch.get_rng_state()
    with pytest.raises(UDAError, match="made ready"):
        a(batches()[0])
    a.prepare(source())
    a.save_prepared(tmp_path / "ready.pt")
    first = [a(x) for x in batches()]
    assert torch.equal(torch.get_rng_state(), before)  # no random number but the adapter's own
    b = Adapter(net(), Everything(), seed=99)
    b.load_prepared(tmp_path / "ready.pt")
    assert all(torch.equal(b(x), z) for x, z in zip(batches(), first, strict=True))
    b.reset()
    assert all(torch.equal(b(x), z) for x, z in zip(batches()[:3], first, strict=False))
    torch.save(b.snapshot(), tmp_path / "state.pt")
    c = Adapter(net(), Everything())
    c.load_prepared(tmp_path / "ready.pt")
    c.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(c(x), z) for x, z in zip(batches()[3:], first[3:], strict=True))


def test_a_file_of_something_else_is_refused(tmp_path):
    a = Adapter(net(), Everything())
    a.prepare(source())
    a.save_prepared(tmp_path / "ready.pt")
    other = net()
    with torch.no_grad():
        other[0].bias += 1
    with pytest.raises(UDAError, match="another source model"):
        Adapter(other, Everything()).load_prepared(tmp_path / "ready.pt")
    torch.save({}, tmp_path / "bare.pt")
    with pytest.raises(UDAError, match="no file of a method"):
        a.load_prepared(tmp_path / "bare.pt")
    with pytest.raises(UDAError, match="labels"):
        a.prepare(SourceSamples(source().x))


def test_source_samples_of_several_domains():
    loader = [{"x": torch.ones(3, 2), "y": torch.arange(3)}] * 2
    taken = SourceSamples.take([loader, [(torch.zeros(4, 2), torch.arange(4))]], limit=5)
    assert len(taken) == 9
    assert taken.domain.tolist() == [0] * 5 + [1] * 4
    assert SourceSamples.take([loader], labels=False).y is None
    assert sum(len(b["x"]) for b in taken.batches(4, torch.Generator())) == 9
    with pytest.raises(UDAError, match="no source samples"):
        SourceSamples.take([[]])


def test_export_has_the_layers_of_the_model_and_what_was_learned():
    a = Adapter(net(), TENT(lr=0.1))
    a(batches()[0])
    out = a.export()
    assert repr(out) == repr(net())
    assert torch.equal(out[1].weight, a.parameters[0])
    assert not torch.equal(out[1].weight, net()[1].weight)


@pytest.mark.parametrize("channels", [1, 3])
def test_views_work_on_pixels_by_the_own_generator(channels):
    pixels = torch.rand(4, channels, 16, 16)
    a = Adapter(nn.Sequential(nn.Flatten(), nn.Linear(channels * 256, 2)), Source(), mean=0.5, std=0.25)
    same = a.view((pixels - 0.5) / 0.25, lambda x, g: x)
    assert torch.allclose(same, (pixels - 0.5) / 0.25, atol=1e-6)
    one, two = (cotta_view(pixels, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert one.shape == pixels.shape
    assert 0 <= one.min() <= one.max() <= 1
    assert torch.equal(one, cotta_view(pixels, torch.Generator().manual_seed(0)))
    assert not torch.equal(one, two)


def test_methods_are_found_by_name_or_class_path():
    assert {"TENT", "SAR", "LAME", "Source"} <= set(methods())
    assert method_class("uda_testtime.methods.TENT") is TENT
    for bad in ("TNET", "uda_testtime.adapter.Adapter", "nowhere.Method"):
        with pytest.raises(UDAError, match=r"TENT|Method"):
            method_class(bad)
