"""MLNet: its objectives and neighbourhoods by loops, and what they do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from uda_universal import MLNet, OVANet
from uda_universal.mlnet import (
    disagreement,
    mixed,
    neighbour_sets,
    neighbourhood_loss,
    overlaps,
    own_class_denied,
)

import uda
from uda.testing import check_plugin


def unit(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.bottleneck.parameters()])


def sets_by_loops(rows, share):
    """Indices of more than ``share`` times the largest cosine to another row, and that row."""
    out = []
    for i, a in enumerate(rows):
        cosine = {j: float(a @ b) for j, b in enumerate(rows) if j != i}
        best = max(cosine, key=cosine.get)
        out.append({j for j, c in cosine.items() if c > share * cosine[best]} | {best})
    return out


@pytest.mark.parametrize("chunk", [2**24, 7])
def test_sets_and_overlaps_by_loops(chunk):
    rows = unit(14, 3)
    expected = sets_by_loops(rows, 0.7)
    sets, count = neighbour_sets(torch.tensor(rows), 0.7, 14, chunk)
    assert [set(s.tolist()) - {14} for s in sets] == expected
    assert count.tolist() == [len(s) for s in expected]
    assert len(set(count.tolist())) > 2
    index, others = [3, 0, 11], [1, 2, 5, 13]
    got = overlaps(sets, count, torch.tensor(index), torch.tensor(others))
    for b, i in enumerate(index):
        for m, j in enumerate(others):
            shared, either = expected[i] & expected[j], expected[i] | expected[j]
            assert float(got[b, m]) == pytest.approx(len(shared) / len(either))
    few, kept = neighbour_sets(torch.tensor(rows), 0.7, 2, chunk)
    for i, s in enumerate(expected):  # the nearest stay
        nearest = sorted(s, key=lambda j: -rows[i] @ rows[j])[:2]
        assert set(few[i].tolist()) - {14} == set(nearest)
        assert kept[i] == len(nearest)


def test_rows_without_a_positive_cosine_keep_the_nearest():
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [-1.0, 0.2]]), dim=1)
    sets, count = neighbour_sets(rows, 0.875, 2)
    assert sets[:, 0].tolist() == [1, 0]
    assert count.tolist() == [1, 1]
    empty = torch.zeros(2, dtype=torch.long)  # before a look: no weight, and no division by nothing
    assert overlaps(torch.full((2, 2), 2, dtype=torch.int32), empty, empty[:1], empty).tolist() == [[0.0, 0.0]]


def test_neighbourhood_loss_by_loops():
    f, memory, index = 3 * unit(4, 3, seed=1), unit(12, 3, seed=2), [7, 0, 3, 11]
    share, scale = 0.6, 10.0
    kept = sets_by_loops(memory, share)
    now = memory.copy()
    for row, i in zip(f, index, strict=True):
        now[i] = row / np.linalg.norm(row)
    total = 0.0
    for i in index:
        cosine = np.array([-1.0 if j == i else now[i] @ now[j] for j in range(12)])
        p = np.exp(scale * cosine) / np.exp(scale * cosine).sum()
        near = [j for j in range(12) if cosine[j] > share * cosine.max()]
        for j in near:
            total -= len(kept[i] & kept[j]) / len(kept[i] | kept[j]) * math.log(p[j]) / len(near) / 4
    features = torch.tensor(f, requires_grad=True)
    sets, count = neighbour_sets(torch.tensor(memory), share, 12)
    args = torch.tensor(memory), torch.tensor(index), sets, count, share, scale
    loss = neighbourhood_loss(features, *args)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    assert total > 0.01
    loss.backward()
    assert features.grad.abs().sum() > 0
    moved = neighbourhood_loss(features.detach() - 0.05 * features.grad, *args)
    assert float(moved) < total
    unseen = torch.full_like(sets, 12), torch.zeros_like(count)  # nothing was found about the neighbours: no weight
    assert float(neighbourhood_loss(features, *args[:2], *unseen, share, scale).detach()) == 0


def test_mixture_and_consistency_by_loops():
    draw = np.random.default_rng(3)
    z, pairs, y = draw.normal(size=(5, 4)), draw.normal(size=(5, 2, 4)), draw.integers(0, 4, 5)
    denied = agree = 0.0
    for i in range(5):
        p = np.exp(z[i]) / np.exp(z[i]).sum()
        q = np.exp(pairs[i, 1]) / np.exp(pairs[i]).sum(0)
        denied -= math.log(1 - q[y[i]]) / 5
        agree -= sum(p[k] * q[k] for k in range(4)) / 20
    assert float(own_class_denied(torch.tensor(pairs), torch.tensor(y))) == pytest.approx(denied)
    assert float(disagreement(torch.tensor(z), torch.tensor(pairs))) == pytest.approx(agree)


def test_mixed_rows_lie_between_the_domains():
    torch.manual_seed(0)
    a = mixed(torch.ones(6000, 2), torch.zeros(7, 2), alpha=2.0)
    assert torch.equal(a[:, 0], a[:, 1])
    assert 0 < a.min() < a.max() < 1
    assert float(a.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(a[:, 0].var()) == pytest.approx(1 / 20, rel=0.1)  # of Beta(2, 2)
    source, target = torch.tensor([1.0, 0.0]).repeat(7, 1), torch.tensor([[0.0, 1], [0, 2], [0, 3]])
    a, b = mixed(source, target, alpha=2.0).T  # each source row has a partner, in turn
    torch.testing.assert_close(b / (1 - a), torch.tensor([1.0, 2, 3, 1, 2, 3, 1]))


@pytest.mark.slow
def test_each_objective_reaches_the_network(universal_fit):
    ends = {}
    parts = ("mixup_weight", "consistency_weight", "neighbour_weight")
    for left_out in (None, *parts):
        given = {"every": 0.2} | ({left_out: 0.0} if left_out else {})
        model, _, _ = universal_fit({"align": MLNet(**given)}, epochs=1)
        ends[left_out] = weights(model)
        plugin = model.plugins["align"]
        if left_out != "neighbour_weight":
            torch.testing.assert_close(plugin.memory.features.norm(dim=1), torch.ones(model.sizes["target"]))
            assert int(plugin.looks) == 4
            assert (plugin.count > 0).all()
        else:
            assert not plugin.memory.filled.any()
    assert all(not torch.equal(ends[None], ends[p]) for p in parts)


@pytest.mark.slow
def test_a_mixture_is_taught_to_be_unknown(universal_fit):
    """With more weight on mixed samples, more of the target's own classes are found."""
    found = []
    for weight in (0.0, 1.0):
        _, _, figures = universal_fit({"align": MLNet(mixup_weight=weight)}, epochs=2)
        found.append(figures["oracle/unk"])
    assert found[1] > found[0]


def test_without_its_three_objectives_it_is_ovanet(universal_fit):
    off = dict.fromkeys(("mixup_weight", "consistency_weight", "neighbour_weight"), 0.0)
    one, _, _ = universal_fit({"align": MLNet(unit=True, **off)}, epochs=1)
    other, _, _ = universal_fit({"align": OVANet()}, epochs=1)
    assert torch.equal(weights(one), weights(other))


def test_bad_arguments():
    for given in ({"mixup_weight": -1.0}, {"alpha": 0.0}, {"share": 1.5}, {"every": 0.0}, {"most": 0}, {"weight": -1}):
        with pytest.raises(uda.UDAError, match="MLNet"):
            MLNet(**given)


@pytest.mark.slow
def test_plugin():
    check_plugin(MLNet, ddp=False)
