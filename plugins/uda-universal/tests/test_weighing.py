"""UAN, CMU and PPOT: their equations in loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_universal import CMU, PPOT, UAN
from uda_universal.cmu import Ensemble, certainty, uncertainties
from uda_universal.common import unit_range
from uda_universal.ppot import farthest_weights, partial_plan
from uda_universal.uan import normalised, transferability

import uda
from uda.testing import check_plugin

SMALL = {
    UAN: {"hidden": 16, "threshold": None},
    CMU: {"hidden": 16, "members": 3},
    PPOT: {"warmup": 0.0},
}


def softmax(z):
    e = np.exp(np.asarray(z) - np.max(z))
    return e / e.sum()


# ------------------------------------------------------------------------------------------------ UAN and CMU


def test_transferability_by_loops():
    draw = np.random.default_rng(0)
    d, z = draw.normal(size=5), draw.normal(size=(5, 4))
    entropies = [-(p := softmax(row)) @ np.log(p) / math.log(4) for row in z]
    expected = [1 / (1 + math.exp(-a)) - h for a, h in zip(d, entropies, strict=True)]
    got = transferability(torch.tensor(d), torch.tensor(z))
    assert got.tolist() == pytest.approx(expected, rel=1e-9)
    w = np.array(expected)
    w = (w - w.min()) / (w.max() - w.min())
    assert normalised(got).tolist() == pytest.approx(list(w / w.mean()), rel=1e-9)
    assert normalised(torch.full((3,), 0.3)).tolist() == [1, 1, 1]


def test_uncertainties_by_loops():
    z = np.random.default_rng(1).normal(size=(3, 4, 5))
    expected = []
    for b in range(4):
        p = [softmax(z[i, b]) for i in range(3)]
        entropy = -sum((q * np.log(q)).sum() for q in p) / 3
        spread = np.mean([np.std([q[c] for q in p], ddof=1) for c in range(5)])
        expected.append([entropy, spread, 1 - sum(q.max() for q in p) / 3])
    got = uncertainties(torch.tensor(z))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)
    w = 1 - unit_range(got).mean(1)
    torch.testing.assert_close(certainty(got, got.amin(0), got.amax(0)), w)


def test_members_start_apart_and_learn_without_the_features():
    torch.manual_seed(0)
    net, x = Ensemble(6, 3, 5), torch.randn(4, 6, requires_grad=True)
    z = net(x)
    assert z.shape == (5, 4, 3)
    torch.testing.assert_close(z[3], x @ net.weight[3].T + net.bias[3])
    assert len({round(float(w.detach().norm()), 4) for w in net.weight}) == 5


def test_adversary_of_cmu_by_loops():
    """Means over samples, so that small weights make a domain count less."""
    torch.manual_seed(0)
    plugin = CMU(weight=0.7, hidden=8, members=3)
    plugin.build(SimpleNamespace(num_classes=3, feature_dim=4))
    plugin.class_weight.copy_(torch.tensor([0.9, 0.4, 0.1]))
    plugin.log_later = lambda **_: None
    zs, zt, y = [0.3, -1.0, 2.0], [0.7, -0.4], [0, 2, 1]
    plugin.domain_logits = lambda step, source, target: (torch.tensor(zs), torch.tensor(zt))
    ft = torch.randn(2, 4)
    step = SimpleNamespace(
        pooled={"y": torch.tensor(y), "features": torch.zeros(3, 4)}.get, target=SimpleNamespace(features=ft)
    )
    w_t = certainty(uncertainties(plugin.ensemble(ft)), *plugin.ranges[0]).tolist()
    source = sum(float(plugin.class_weight[c]) * math.log1p(math.exp(-z)) for c, z in zip(y, zs, strict=True)) / 3
    target = sum(w * math.log1p(math.exp(z)) for w, z in zip(w_t, zt, strict=True)) / 2
    assert float(plugin.align_features(step)["domain"]) == pytest.approx(0.7 * (source + target) / 2, rel=1e-5)


# ------------------------------------------------------------------------------------------------ PPOT


def test_prototypes_move_and_carry_a_gradient():
    plugin = PPOT(momentum=0.3)
    plugin.register_buffer("prototypes", torch.eye(3, 4))
    f = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = torch.tensor([0, 0, 1, 1, 1])
    found = plugin.moved(SimpleNamespace(pooled={"features": f, "y": y}.get))
    for c in range(3):
        rows = [f[i] / f[i].norm() for i in range(5) if y[i] == c]
        mean = sum(rows) / len(rows) if rows else plugin.prototypes[c]
        moved = 0.7 * plugin.prototypes[c] + 0.3 * mean
        torch.testing.assert_close(found[c], moved / moved.norm())
    (g,) = torch.autograd.grad(found[0, 1], f)
    assert (g.abs().sum(1) > 0).tolist() == (y == 0).tolist()


def test_partial_plan_has_its_masses():
    cost = torch.tensor(np.random.default_rng(0).random((3, 6)))
    plan = partial_plan(cost / cost.max(), 0.5, 0.8, 0.05)
    assert float(plan.sum()) == pytest.approx(0.5, abs=1e-6)
    assert (plan.sum(1) <= 0.5 / 0.8 / 3 + 1e-6).all()
    assert (plan.sum(0) <= 1 / 6 + 1e-6).all()
    # where no mass bound is reached, all entries share one log factor
    free_rows, free_columns = plan.sum(1) < 0.5 / 0.8 / 3 - 1e-4, plan.sum(0) < 1 / 6 - 1e-4
    inner = (plan.log() + cost / cost.max() / 0.05)[free_rows][:, free_columns]
    assert inner.numel() < 2 or float(inner.std()) < 1e-3


def test_weights_by_loops():
    draw = np.random.default_rng(2)
    cost, plan = draw.random((3, 8)), draw.random((3, 8)) / 48
    sure, doubt = farthest_weights(torch.tensor(cost), torch.tensor(plan), 0.5, 0.25)
    far = sorted(range(8), key=lambda b: -cost[:, b].min())[:2]
    for b in range(8):
        w = plan[:, b].sum() * 8 / 0.5
        assert float(sure[b]) == pytest.approx(w)
        assert float(doubt[b]) == pytest.approx(1 - w if b in far else 0.0)


# ------------------------------------------------------------------------------------------------ errors, lifecycle


def test_bad_arguments():
    for make in (
        lambda: UAN(threshold=2.0), lambda: UAN(temperature=0.0), lambda: CMU(members=1), lambda: CMU(view="y"),
        lambda: PPOT(epsilon=0.0), lambda: PPOT(far=1.5),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()


def test_a_threshold_that_is_given_counts_over_that_of_a_checkpoint():
    draw = torch.Generator().manual_seed(0)
    strange = torch.linspace(-1, 1, 21)
    batch = SimpleNamespace(role="target", features=torch.randn(21, 4, generator=draw), logits=torch.zeros(21, 3))
    prediction = uda.Prediction(label=torch.zeros(21, dtype=torch.long), score=torch.ones(21))
    old, new = UAN(threshold=-0.5), UAN(threshold=0.25)
    new.load_state_dict(old.state_dict())
    new.strangeness = lambda features, logits: strange
    assert torch.equal(new.reject(None, batch, prediction).unknown, strange > -0.25)


@pytest.mark.slow
@pytest.mark.parametrize("method", list(SMALL))
def test_plugin(method):
    check_plugin(method, init_args=SMALL[method], ddp=False)
