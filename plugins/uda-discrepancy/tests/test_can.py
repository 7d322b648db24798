"""CAN against its equations, written a second time pair by pair of classes."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_discrepancy import CAN
from uda_discrepancy.clustering import class_centres, spherical_kmeans

import uda
from uda.kernels import contrastive_discrepancy
from uda.testing import check_plugin

C, F = 4, 5


def kernel(d: float, v: float) -> float:
    return sum(math.exp(-d / (2 * a * v)) for a in (0.125, 0.25, 0.5, 1, 2))


def pair_mmd(one: list[np.ndarray], other: list[np.ndarray], width: float | None = None) -> float:
    """Biased squared MMD of two small sets, its width the mean distance of distinct samples of both."""
    union = [*one, *other]
    if width is None:
        distances = [((a - b) ** 2).sum() for i, a in enumerate(union) for j, b in enumerate(union) if i != j]
        width = sum(distances) / len(distances)

    def mean(x, y):
        return sum(kernel(((a - b) ** 2).sum(), width) for a in x for b in y) / (len(x) * len(y))

    return mean(one, one) + mean(other, other) - 2 * mean(one, other)


def cdd_loops(s, ys, t, yt) -> float:
    both = [c for c in range(C) if c in ys and c in yt]
    table = {
        (c, d): pair_mmd([s[i] for i in range(len(s)) if ys[i] == c], [t[i] for i in range(len(t)) if yt[i] == d])
        for c in both
        for d in both
    }
    intra = [v for (c, d), v in table.items() if c == d]
    inter = [v for (c, d), v in table.items() if c != d]
    return sum(intra) / len(intra) - (sum(inter) / len(inter) if inter else 0.0)


LABELS = [
    ([0, 0, 1, 1, 2, 3, 3, 3], [0, 1, 1, 2, 2, 2, 3]),  # all classes
    ([0, 0, 1, 1, 1, 3, 3, 3], [0, 1, 1, -1, 2, 2, -1]),  # 2 is not in the source, 3 not in the target, two left out
    ([0, 0, 1, 1, 1, 3, 3, 3], [0, -1, 2, 2, 2, 2, 0]),  # a single common class: no pair of different ones
]


@pytest.mark.parametrize(("ys", "yt"), LABELS)
def test_discrepancy_against_loops(ys, yt):
    random = torch.Generator().manual_seed(0)
    s, t = (torch.randn(len(y), F, generator=random, dtype=torch.float64) for y in (ys, yt))
    got = contrastive_discrepancy(s, torch.tensor(ys), t, torch.tensor(yt), C)
    assert float(got) == pytest.approx(cdd_loops(s.numpy(), ys, t.numpy(), yt), rel=1e-9)


def test_widths_are_constants():
    """The gradient is that of one pair's MMD at a fixed width."""
    random = torch.Generator().manual_seed(0)
    s = torch.randn(3, F, generator=random, dtype=torch.float64, requires_grad=True)
    t = torch.randn(2, F, generator=random, dtype=torch.float64, requires_grad=True)
    value = contrastive_discrepancy(s, torch.zeros(3).long(), t, torch.zeros(2).long(), C)
    got = torch.autograd.grad(value, [s, t])
    union = torch.cat([s, t])
    d = (union[:, None] - union[None]).square().sum(-1)
    v = d.detach().sum() / 20
    k = sum(torch.exp(-d / (2 * a * v)) for a in (0.125, 0.25, 0.5, 1, 2))
    expected = torch.autograd.grad(k[:3, :3].mean() + k[3:, 3:].mean() - 2 * k[:3, 3:].mean(), [s, t])
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)


@pytest.mark.parametrize("yt", [[-1, -1], [1, 1]])
def test_no_common_class_is_zero(yt):
    s, t = torch.randn(2, F, requires_grad=True), torch.randn(2, F, requires_grad=True)
    value = contrastive_discrepancy(s, torch.zeros(2).long(), t, torch.tensor(yt), C)
    assert value.item() == 0
    assert all(float(g.abs().max()) == 0 for g in torch.autograd.grad(value, [s, t]))


def test_one_sample_a_domain_is_finite():
    s, t = torch.randn(1, F, requires_grad=True), torch.randn(1, F, requires_grad=True)
    value = contrastive_discrepancy(s, torch.zeros(1).long(), t, torch.zeros(1).long(), C)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in torch.autograd.grad(value, [s, t]))
    same = s.detach().clone().requires_grad_()
    value = contrastive_discrepancy(s, torch.zeros(1).long(), same, torch.zeros(1).long(), C)
    assert value.item() == pytest.approx(0, abs=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(value, [s, same]))


def test_descent_draws_classes_together_and_apart():
    random = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 2
    s = torch.randn(24, F, generator=random) + y[:, None]
    t = (torch.randn(24, F, generator=random) + 1 - y[:, None]).requires_grad_()  # the classes are swapped

    def gaps():
        means = [[x[y == c].mean(0) for c in (0, 1)] for x in (s, t.detach())]
        same = sum(float((means[0][c] - means[1][c]).norm()) for c in (0, 1))
        return same, sum(float((means[0][c] - means[1][1 - c]).norm()) for c in (0, 1))

    before = gaps()
    for _ in range(40):
        (grad,) = torch.autograd.grad(contrastive_discrepancy(s, y, t, y, 2), [t])
        t = (t - 3 * grad).detach().requires_grad_()
    same, other = gaps()
    assert same < before[0]
    assert other > before[1]


# ----------------------------------------------------------------------------------------------- clustering


def test_centres_against_loops():
    x, y = torch.randn(9, F), torch.tensor([0, 0, 1, 1, 1, 3, 3, 3, 3])
    centres, count = class_centres(x, y, C)
    assert count.tolist() == [2, 3, 0, 4]
    for c in range(C):
        total = sum((x[i].numpy() / np.linalg.norm(x[i].numpy()) for i in range(9) if y[i] == c), np.zeros(F))
        norm = np.linalg.norm(total)
        np.testing.assert_allclose(centres[c], total / norm if norm else total, rtol=1e-5, atol=1e-6)


def test_kmeans_finds_rotated_classes():
    """Three bundles of directions, their first centres half-way off; lengths do not matter."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    axes = torch.eye(3)
    x = (axes[y] + 0.2 * torch.randn(60, 3, generator=random)) * (1 + 9 * torch.rand(60, 1, generator=random))
    first = axes + 0.5 * axes.roll(1, 0)
    label, distance, centres = spherical_kmeans(x, first, tolerance=1e-6)
    assert torch.equal(label, y)
    for i in range(60):
        o, f = centres[y[i]].numpy(), x[i].numpy()
        assert float(distance[i]) == pytest.approx((1 - f @ o / np.linalg.norm(f)) / 2, abs=1e-5)


def test_a_cluster_without_samples_keeps_its_centre():
    x = torch.tensor([[1.0, 0.1], [1.0, -0.1]])
    label, _, centres = spherical_kmeans(x, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert label.tolist() == [0, 0]
    torch.testing.assert_close(centres[1], torch.tensor([-1.0, 0.0]))


def pools(target: torch.Tensor):
    source = {
        "a": SimpleNamespace(features=torch.eye(3), y=torch.tensor([0, 1, 2])),
        "b": SimpleNamespace(features=2 * torch.eye(3), y=torch.tensor([0, 1, 2])),
    }
    return SimpleNamespace(sources=source, target=SimpleNamespace(features=target))


def fake_model(size: int):
    return SimpleNamespace(sizes={"target": size}, target_name="target", num_classes=3)


def test_refresh_keeps_near_samples_of_full_classes():
    """Six samples near axis 0, three near axis 1 of which one is far off, and one near axis 2."""
    target = torch.tensor([[5.0, 0, 0]] * 6 + [[0, 5.0, 0.1]] * 2 + [[0, 3.0, 2.9], [0, 0, 1.0]])
    plugin = CAN(max_distance=0.05, min_samples=2, domain_batchnorm=False)
    plugin.build(fake_model(10))
    assert plugin.labels.tolist() == [-1] * 10
    plugin.refresh(fake_model(10), pools(target))
    assert plugin.labels.tolist() == [0] * 6 + [1, 1] + [-1, -1]
    torch.testing.assert_close(plugin.shares, torch.tensor([0.8, 0.8]))
    plugin.refresh(fake_model(10), pools(target))
    torch.testing.assert_close(plugin.shares, torch.tensor([0.8, 0.0]))


def test_warm_up_is_zero_with_a_graph():
    plugin = CAN(warmup=0.5, domain_batchnorm=False)
    plugin.build(fake_model(4))
    plugin.labels.copy_(torch.tensor([0, 0, 1, 1]))
    source = {"features": torch.randn(4, F), "logits": torch.randn(4, 3), "y": torch.tensor([0, 0, 1, 1])}
    leaves = [torch.randn(4, F, requires_grad=True), torch.randn(4, 3, requires_grad=True)]
    target = SimpleNamespace(features=leaves[0], logits=leaves[1], index=torch.arange(4))
    for progress, live in ((0.49, False), (0.5, True)):
        step = SimpleNamespace(pooled=source.__getitem__, target=target, model=fake_model(4), progress=progress)
        found = plugin.align_features(step)
        assert sorted(found) == ["cdd_features", "cdd_probs"]
        for grad in torch.autograd.grad(sum(found.values()), leaves):
            assert (float(grad.abs().max()) > 0) == live


def test_bad_arguments_are_refused():
    for wrong in ({"max_distance": 0.0}, {"min_samples": 0}, {"warmup": 1.0}, {"kernels": 0}):
        with pytest.raises(uda.UDAError, match="CAN: "):
            CAN(**wrong)


def test_joint_forwards_are_refused():
    with pytest.raises(uda.UDAError, match=r"forward_mode: separate"):
        uda.UDA("mlp", {"align": CAN()}, num_classes=3, input_shape=[6], sizes={"target": 9})


@pytest.mark.slow
def test_plugin():
    model_args = {"forward_mode": "separate", "bottleneck_norm": "batch"}
    init_args = {"weight": 1.0, "min_samples": 1}
    report = check_plugin(CAN, init_args=init_args, model_args=model_args, ddp=False)
    assert report.objectives == ["cdd_features", "cdd_probs"]
