"""Rotation and jigsaw against pixel loops, and as side tasks of a run."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from uda_selftraining import Jigsaw, Rotation
from uda_selftraining.jigsaw import permutation_set, shuffle_tiles
from uda_selftraining.rotation import rotate

import uda
from uda.nn import SmallCNN
from uda.testing import check_plugin


def test_rotation_against_numpy():
    x = torch.rand(9, 3, 5, 5)
    k = torch.tensor([0, 1, 2, 3, 3, 2, 1, 0, 1])
    got = rotate(x, k)
    for i in range(9):
        np.testing.assert_array_equal(got[i].numpy(), np.rot90(x[i].numpy(), int(k[i]), axes=(1, 2)))
    with pytest.raises(uda.UDAError, match="square"):
        rotate(torch.rand(2, 3, 4, 6), torch.zeros(2))


@pytest.mark.parametrize(("grid", "side"), [(2, 6), (3, 9), (4, 8)])
def test_jigsaw_against_pixel_loops(grid, side):
    x = torch.rand(5, 2, side, side)
    orders = torch.stack([torch.randperm(grid * grid) for _ in range(5)])
    got, tile = shuffle_tiles(x, orders, grid), side // grid
    for i, row, column in itertools.product(range(5), range(side), range(side)):
        place = (row // tile) * grid + column // tile
        origin = int(orders[i, place])
        r, c = (origin // grid) * tile + row % tile, (origin % grid) * tile + column % tile
        assert torch.equal(got[i, :, row, column], x[i, :, r, c])
    untouched = torch.arange(grid * grid).expand(5, -1)
    assert torch.equal(shuffle_tiles(x, untouched, grid), x)


def test_tiles_that_do_not_divide_the_image():
    x = torch.rand(4, 1, 8, 10)
    got = shuffle_tiles(x, torch.arange(9).expand(4, -1), 3)
    expected = torch.nn.functional.interpolate(x[:, :, 1:7, 0:9], (8, 10), mode="bilinear", align_corners=False)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("tiles", "count"), [(4, 23), (4, 5), (9, 30), (16, 12)])
def test_permutations_differ(tiles, count):
    orders = permutation_set(tiles, count)
    assert orders.shape == (count + 1, tiles)
    assert orders[0].tolist() == list(range(tiles))
    assert all(sorted(row) == list(range(tiles)) for row in orders.tolist())
    assert len({tuple(row) for row in orders.tolist()}) == count + 1
    assert torch.equal(orders, permutation_set(tiles, count))  # the same on all processes and in all runs
    if count == 5:  # each new one is as far from the nearest chosen one as any order can be
        every = list(itertools.permutations(range(4)))
        for n in range(1, 6):
            chosen = orders[:n].tolist()
            reach = [min(sum(a != b for a, b in zip(p, q, strict=True)) for q in chosen) for p in every]
            new = min(sum(a != b for a, b in zip(orders[n].tolist(), q, strict=True)) for q in chosen)
            assert new == max(reach)
    with pytest.raises(uda.UDAError, match="23 orders beside their own, not 24"):
        permutation_set(4, 24)


def make(plugin, shape=(1, 8, 8), forward_mode="joint", sources=("s",)):
    torch.manual_seed(0)
    backbone = SmallCNN(shape[0], (4, 8)) if len(shape) == 3 else "identity"
    model = uda.UDA(
        backbone, {"side": plugin}, bottleneck=6, num_classes=3, input_shape=list(shape), forward_mode=forward_mode,
        source_names=list(sources),
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    data = {"sources": {s: {"x": torch.rand(12, *shape, generator=g), "y": torch.zeros(12).long()} for s in sources}}
    return model, uda.Step(model, {**data, "target": {"x": torch.rand(10, *shape, generator=g)}}, 0.5, 0, 0)


@pytest.mark.parametrize("forward_mode", ["joint", "separate"])
@pytest.mark.parametrize("make_plugin", [Rotation, lambda **k: Jigsaw(grid=2, permutations=5, **k)])
def test_objectives_of_a_step(make_plugin, forward_mode):
    """Cross-entropies of the task on changed images, by hand, with the labels that were drawn."""
    plugin = make_plugin(source_weight=0.7, target_weight=0.2)
    model, step = make(plugin, forward_mode=forward_mode, sources=("s", "t"))
    torch.manual_seed(5)
    found = plugin.align_features(step)
    torch.manual_seed(5)
    batches = [*step.sources.values(), step.target]
    labels = [torch.randint(plugin.num_labels(), (len(b.x),)) for b in batches]
    changed = [plugin.change(b.x, y) for b, y in zip(batches, labels, strict=True)]
    if forward_mode == "joint":
        z = plugin.head(model.bottleneck(model.backbone(torch.cat(changed)))).split([12, 12, 10])
    else:
        z = [plugin.head(model.bottleneck(model.backbone(x))) for x in changed]
    losses = []
    for logits, y in zip(z, labels, strict=True):
        p = np.exp(logits.detach().double().numpy())
        p = p / p.sum(1, keepdims=True)
        losses.append(-np.mean([np.log(p[i, int(k)]) for i, k in enumerate(y)]))
    assert float(found["source"]) == pytest.approx(0.7 * (losses[0] + losses[1]) / 2, rel=1e-4)
    assert float(found["target"]) == pytest.approx(0.2 * losses[2], rel=1e-4)
    assert len(step.gate) == (1 if forward_mode == "joint" else 3)  # gradients can be weighed at the features
    grad = torch.autograd.grad(found["target"], list(model.backbone.parameters()), allow_unused=True)
    assert max(float(g.abs().max()) for g in grad if g is not None) > 0


def test_weights_of_zero_leave_a_domain_out():
    _, step = make(Rotation(source_weight=0.0))
    assert set(step.model.plugins["side"].align_features(step)) == {"target"}
    _, step = make(Rotation(target_weight=0.0))
    assert set(step.model.plugins["side"].align_features(step)) == {"source"}


def test_share_of_untouched_images():
    torch.manual_seed(0)
    labels = Jigsaw(grid=2, permutations=5, untouched=0.6).draw(torch.zeros(4000, 1))
    assert float((labels == 0).float().mean()) == pytest.approx(0.6, abs=0.03)
    assert sorted(labels.unique().tolist()) == [0, 1, 2, 3, 4, 5]
    labels = Rotation().draw(torch.zeros(4000, 1))
    assert float((labels == 0).float().mean()) == pytest.approx(0.25, abs=0.03)


def test_descent_learns_the_task():
    """A network learns which way is up, and so tells turned images apart."""
    plugin = Rotation(source_weight=0.0, target_weight=1.0)
    model, step = make(plugin)
    ramp = torch.linspace(0, 1, 8)[:, None].expand(8, 8)  # bright below
    data = {"target": {"x": (ramp + 0.2 * torch.rand(64, 1, 8, 8)).clamp(0, 1)}}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        step = uda.Step(model, data, 0.5, 0, 0)
        loss = plugin.align_features(step)["target"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("make_model", "text"),
    [
        (lambda: make(Rotation(), shape=(6,)), "feature rows have no such task"),
        (lambda: make(Jigsaw(), shape=(6,)), "feature rows have no such task"),
        (lambda: make(Rotation(), shape=(1, 8, 12)), "square"),
        (lambda: make(Jigsaw(grid=8), shape=(1, 6, 6)), "no 8x8 tiles"),
        (lambda: Jigsaw(grid=1), "2 to 8"),
        (lambda: Rotation(source_weight=0.0, target_weight=0.0), "nor both be 0"),
        (lambda: Rotation(untouched=1.0), "untouched"),
    ],
)
def test_what_cannot_work_is_refused(make_model, text):
    with pytest.raises(uda.UDAError, match=text):
        make_model()


CASES = [
    (Rotation, {"kind": "images"}),
    (Jigsaw, {"kind": "images", "init_args": {"grid": 2, "permutations": 5, "untouched": 0.3}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "given"), CASES, ids=[c.__name__ for c, _ in CASES])
def test_plugin(cls, given):
    assert not check_plugin(cls, ddp=False, **given).warnings


@pytest.mark.slow
def test_partial_label_sets():
    """The task needs no label: a target that lacks a class changes nothing for it."""
    split = {"known": ["a", "b"], "source_private": ["c"]}
    check_plugin(Rotation, kind="images", data_args={"classes": split}, only=["lifecycle", "liveness"])
