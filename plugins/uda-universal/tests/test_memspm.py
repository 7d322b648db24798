"""MemSPM: addressing by loops, the memory's start and use, the picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from uda_universal import MemSPM
from uda_universal.memory_view import draw, used_rows
from uda_universal.memspm import address, first_memory, read

import uda
from uda.passes import DomainPool, Pools
from uda.testing import check_plugin


def loops(z, memory, top, t, threshold=None):
    """What a memory gives, as written in the paper: softmax over all, best of each item, hard shrink, sum 1."""
    n = len(memory)
    out = []
    for x in z:
        cosine = np.array([[x @ m / np.linalg.norm(x) / np.linalg.norm(m) for m in item] for item in memory])
        w = np.exp(cosine / t) / np.exp(cosine / t).sum()
        best = w.max(1)
        limit = np.sort(best)[::-1][top] if threshold is None and top < n else (threshold or 0.0)
        cut = np.where(best > limit, best, 0.0)
        if not cut.any():
            cut[best.argmax()] = 1.0
        cut = cut / cut.sum()
        out.append(sum(cut[i] * memory[i, w[i].argmax()] for i in range(n)))
    return np.array(out)


@pytest.mark.parametrize(
    ("top", "t", "threshold"), [(3, 1.0, None), (2, 0.1, None), (6, 0.5, None), (2, 0.2, 0.06), (2, 1.0, 0.9)]
)
def test_addressing_by_loops(top, t, threshold):
    draw_ = np.random.default_rng(top)
    z, memory = draw_.normal(size=(7, 5)), draw_.normal(size=(6, 4, 5))
    m = torch.tensor(memory, requires_grad=True)
    weights, item, sub = address(torch.tensor(z), m, top, t, threshold)
    got = read(m, weights, item, sub)
    np.testing.assert_allclose(got.detach().numpy(), loops(z, memory, top, t, threshold), rtol=1e-9)
    got.square().sum().backward()
    touched = m.grad.abs().sum(2) > 0
    chosen = torch.zeros(6, 4, dtype=torch.bool)
    chosen[item[weights > 0], sub[weights > 0]] = True
    assert torch.equal(touched & ~chosen, torch.zeros_like(chosen))  # what is not addressed gets no gradient


def test_first_memory_keeps_the_looks_of_a_class_apart():
    draw_ = torch.Generator().manual_seed(0)
    means = 5 * torch.eye(4)
    z = torch.cat([m + 0.05 * torch.randn(10, 4, generator=draw_) for m in means])
    memory = first_memory(z, 2, 2, seed=0)
    distances = torch.cdist(means, memory.flatten(0, 1))
    assert (distances.amin(1) < 2.6).all()  # an item of two means has a part for each
    more = first_memory(z[:3], 5, 2, seed=0)
    assert more.shape == (5, 2, 4)
    torch.testing.assert_close(more[0, 0], more[0, 1])  # one sample, repeated


def test_descent_on_the_reconstruction_moves_the_memory():
    memory = torch.randn(5, 2, 4, requires_grad=True)
    z = torch.randn(8, 4)

    def error(m):
        return (read(m, *address(z, m, 2, 0.1)) - z).square().mean()

    (grad,) = torch.autograd.grad(error(memory), [memory])
    assert error(memory - 0.05 * grad) < error(memory)


def test_picture_and_bad_arguments(tmp_path):
    count = torch.tensor([[3.0, 0], [0, 0], [1, 2], [0, 0]])
    found = {"source": count, "target": torch.tensor([0.0, 4, 1, 0]), "weight": torch.full((4, 6), -2.0),
             "x": torch.rand(4, 6, 1, 5, 5), "is_target": torch.zeros(4, 6, dtype=torch.bool)}  # fmt: skip
    found["weight"][0, :2] = 0.5
    assert sorted(used_rows(found).tolist()) == [0, 1, 2]
    for pictures in (found["x"], None):
        draw(found | {"x": pictures}, 2, ["cat", "dog"], tmp_path / "p.png")
        assert (tmp_path / "p.png").stat().st_size > 1000
    for options in ({"items": 3, "top": 4}, {"decoder": "pixels"}, {"address_temperature": 0.0}, {"threshold": 2.0}):
        with pytest.raises(uda.UDAError):
            MemSPM(**options)


def test_features_pass_until_the_encoder_has_learnt():
    torch.manual_seed(0)
    plugin, late = MemSPM(items=4, subs=2, top=2, picture=False), MemSPM(items=4, subs=2, top=2, warmup=0.5)
    for p, progress in ((plugin, 0.0), (late, 0.0), (late, 0.6)):
        model = uda.UDA(
            "identity", {"align": p}, num_classes=2, input_shape=[6], source_names=["s"], sizes={"target": 20}
        ).eval()
        type(model).progress, before = property(lambda _, at=progress: at), type(model).progress
        x = torch.randn(20, 6)
        with torch.no_grad():
            z = model.bottleneck(model.backbone(x))
            pool = DomainPool("s", "source", z, model.head(z), torch.arange(20) % 2)
            p.refresh(model=model, bank=Pools({"s": pool}, replace(pool, y=None)))
            seen = model.batch(x).features
        type(model).progress = before
        assert bool(p.started) == (p is plugin or progress > 0.5)
        assert torch.equal(seen, z) != bool(p.started)


@pytest.mark.slow
def test_known_classes_pass_through_the_memory(universal_fit):
    ends = []
    for rec_weight in (0.0, 0.5):
        plugin = MemSPM(items=10, subs=3, refresh_every=20, rec_weight=rec_weight, warmup=0.3)
        _, _, figures = universal_fit({"align": plugin}, epochs=3, forward_mode="separate")
        assert figures["oracle/os_star"] > 0.8
        assert plugin.started
        assert 1 < (plugin.used > 0).sum() <= 30
        ends.append(plugin.memory.detach().clone())
    assert not torch.allclose(*ends)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"freeze": True, "decoder": "input"}])
def test_memspm_plugin(options):
    # clusters of rounded features would start the memory elsewhere, which is no matter of precision
    given = {"refresh_every": 2, "items": 6, "subs": 2, "top": 3, "memory_start": "random"} | options
    report = check_plugin(MemSPM, init_args=given, ddp=False)
    assert "reconstruction" in report.objectives
