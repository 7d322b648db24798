"""Classical transport against calculations of its own, and inside a training."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_transport import OTDA, transport

import uda
from uda.testing import check_plugin

PLANNED = ["emd", "sinkhorn", "group_lasso", "group_lasso_l2", "mapping", "jcpot"]


def blobs(n=24, shift=3.0, classes=3, seed=0, shares=None):
    """Classes at the corners of a simplex, and the same shifted along the last axis."""
    draw = np.random.default_rng(seed)
    y = np.arange(n) % classes if shares is None else draw.choice(classes, n, p=shares)
    x = np.eye(4)[y] * 4 + draw.normal(size=(n, 4)) * 0.3
    x[:, 3] += shift
    return x, y


def test_emd_is_the_best_matching():
    draw = np.random.default_rng(0)
    x, z, y = draw.normal(size=(6, 3)), draw.normal(size=(6, 3)), np.array([0, 0, 1, 1, 2, 2])
    best = min(
        itertools.permutations(range(6)), key=lambda order: sum(((x[i] - z[j]) ** 2).sum() for i, j in enumerate(order))
    )
    moved = transport([x], [y], z, "emd")
    np.testing.assert_allclose(moved.sources[0], z[list(best)])
    for i, j in enumerate(best):
        np.testing.assert_allclose(moved.target_probs[j], np.eye(3)[y[i]])


def test_sinkhorn_moves_to_weighted_means():
    (x, y), (z, _) = blobs(12, 0.0), blobs(9, 1.0, seed=1)
    cost = np.array([[((a - b) ** 2).sum() for b in z] for a in x])
    kernel, v = np.exp(-cost / np.median(cost) / 0.3), np.ones(9)
    for _ in range(3000):
        u = (1 / 12) / (kernel @ v)
        v = (1 / 9) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    moved = transport([x], [y], z, "sinkhorn", reg=0.3)
    np.testing.assert_allclose(moved.sources[0], np.array([sum(p * z) / p.sum() for p in plan[..., None]]), atol=1e-5)
    shares = np.array([[plan[y == c, j].sum() for c in range(3)] for j in range(9)]) * 9
    np.testing.assert_allclose(moved.target_probs, shares, atol=1e-5)


def test_linear_takes_mean_and_covariance_over():
    draw = np.random.default_rng(0)
    x, z = draw.normal(size=(4000, 3)), draw.normal(size=(4000, 3)) @ np.diag([2.0, 1.0, 0.5]) + [1, 2, 3]
    moved = transport([x], [np.zeros(4000)], z, "linear", reg=1e-8).sources[0]
    np.testing.assert_allclose(moved.mean(0), z.mean(0), atol=1e-6)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(z.T), atol=1e-3)


@pytest.mark.parametrize("method", [*PLANNED, "linear"])
def test_classes_arrive_at_their_like(method):
    (x, y), (z, t) = blobs(30), blobs(24, shift=0.0, seed=1)
    moved = transport([x[:18], x[18:]], [y[:18], y[18:]], z, method, classes=5)
    centres = np.stack([z[t == c].mean(0) for c in range(3)])
    arrived = np.concatenate(moved.sources)
    nearest = ((arrived[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert [len(s) for s in moved.sources] == [18, 12]
    assert (nearest == y).mean() > 0.9
    if method == "linear":
        assert moved.target_probs is None
    else:
        assert moved.target_probs.shape == (24, 5)
        assert (moved.target_probs.argmax(1) == t).mean() > 0.9


def test_sinkhorn_of_a_tiny_entropy_falls_back_to_logarithms():
    """exp(-cost / reg) underflows for a source sample far from all others; the plan must still move it."""
    (x, y), (z, _) = blobs(30), blobs(24, shift=0.0, seed=1)
    x[0] += 300.0
    moved = transport([x], [y], z, "sinkhorn", reg=0.01, norm=None)
    low, high = z.min(0) - 1e-6, z.max(0) + 1e-6
    assert ((moved.sources[0] >= low) & (moved.sources[0] <= high)).all()  # barycentres of target samples


def test_jcpot_finds_the_class_shares_where_the_plain_plan_cannot():
    sources = [blobs(60, 0.0, seed=k, shares=s) for k, s in enumerate([[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]])]
    z, t = blobs(80, shift=0.5, seed=5, shares=[0.15, 0.7, 0.15])
    xs, ys = [x for x, _ in sources], [2 * y + 1 for _, y in sources]  # class ids with gaps: 1, 3, 5
    found = transport(xs, ys, z, "jcpot", reg=0.1)
    truth = np.bincount(2 * t + 1, minlength=6) / 80
    np.testing.assert_allclose(found.proportions, truth, atol=0.06)
    correct = (found.target_probs.argmax(1) == 2 * t + 1).mean()
    plain = (transport(xs, ys, z, "emd").target_probs.argmax(1) == 2 * t + 1).mean()
    assert correct > 0.95 > plain + 0.1
    assert all(y.min() == 1 for y in ys)  # labels of the caller stay


def test_jcpot_of_one_source_is_that_of_the_same_source_twice():
    (x, y), (z, _) = blobs(30, 0.0, shares=[0.6, 0.3, 0.1]), blobs(20, shift=0.5, seed=5)
    one, two = transport([x], [y], z, "jcpot", reg=0.1), transport([x, x], [y, y], z, "jcpot", reg=0.1)
    assert len(one.sources) == 1
    for a, b in ((one.sources[0], two.sources[0]), (one.target_probs, two.target_probs)):
        np.testing.assert_allclose(a, b)
    np.testing.assert_allclose(one.proportions, two.proportions)


def test_bad_input():
    (x, y), (z, _) = blobs(), blobs(seed=1)
    bad = x.copy()
    bad[0, 0] = np.nan
    cases = [
        ("shape", [x[0]], [y], z, {}), ("use COOT", [x[:, :2]], [y], z, {}), ("NaN", [bad], [y], z, {}),
        ("class id", [x], [y[:-1]], z, {}), ("each source", [x, x], [y], z, {}),
        ("unknown method", [x], [y], z, {"method": "em"}),
        ("divides costs", [x], [y], z, {"norm": "mean"}), ("no option", [x], [y], z, {"steps": 3}),
        ("same classes", [x, x], [y, y.clip(0, 1)], z, {"method": "jcpot"}),
    ]  # fmt: skip
    for match, xs, ys, t, options in cases:
        with pytest.raises(uda.UDAError, match=match):
            transport(xs, ys, t, **options)


# ------------------------------------------------------------------------------------------------ in training


def refreshed(**options) -> tuple[OTDA, np.ndarray]:
    (x, y), (z, t) = blobs(60), blobs(50, shift=0.0, seed=1)
    plugin = OTDA(**options)
    model = SimpleNamespace(
        num_classes=3, feature_dim=4, source_names=["s"], target_name="t", sizes={"s": 60, "t": 50}
    )
    plugin.build(model)
    as_tensors = [torch.tensor(v) for v in (x.astype(np.float32), y, z.astype(np.float32))]
    pools = SimpleNamespace(
        sources={"s": SimpleNamespace(features=as_tensors[0], y=as_tensors[1])},
        target=SimpleNamespace(features=as_tensors[2]),
    )
    plugin.refresh(model, pools)
    return plugin, t


@pytest.mark.parametrize("options", [{}, {"max_samples": 20}, {"learn": "labelled_target", "max_samples": 30}])
def test_the_head_learns_the_target(options):
    torch.manual_seed(0)
    plugin, _ = refreshed(method="emd", **options)
    assert int(plugin.count) == {0: 60, 20: 20, 30: 30}[options.get("max_samples", 0)] == len(plugin.rows)
    head = torch.nn.Linear(4, 3)
    step = SimpleNamespace(model=SimpleNamespace(head=head), progress=0.0)
    optimiser = torch.optim.SGD(head.parameters(), 0.5)
    for _ in range(60):
        optimiser.zero_grad()
        sum(plugin.refine_classifier(step).values()).backward()
        optimiser.step()
    z, t = blobs(300, shift=0.0, seed=7)
    accuracy = (head(torch.tensor(z, dtype=torch.float32)).argmax(1).numpy() == t).mean()
    # the class shares of two small draws differ, and a plan that keeps all mass must send the rest to a wrong class
    assert accuracy > (0.75 if options else 0.95)


def test_a_draw_for_jcpot_keeps_every_class():
    torch.manual_seed(0)
    y = torch.tensor([0] * 40 + [1] * 40 + [2])
    plugin = OTDA(method="jcpot", learn="labelled_target", max_samples=5)
    for _ in range(5):
        rows, labels = plugin._subset(torch.arange(81.0)[:, None], y)
        assert set(labels) == {0, 1, 2}
        assert len(set(rows[:, 0])) == 5  # no sample twice


def test_bad_arguments():
    cases = [{"method": "em"}, {"learn": "all"}, {"norm": "mean"}, {"reg": 0.0}, {"max_samples": 1}, {"weight": -1.0}]
    for options in [*cases, {"method": "linear", "learn": "labelled_target"}]:
        with pytest.raises(uda.UDAError):
            OTDA(**options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("init_args", "sources"),
    [
        ({"method": "group_lasso", "max_samples": 20}, 1),
        ({"method": "jcpot", "learn": "labelled_target", "reg": 0.1}, 2),
    ],
)
def test_plugin(init_args, sources):
    report = check_plugin(OTDA, init_args=init_args, sources=sources, ddp=False)
    assert report.objectives == ["transported"]
    assert not report.warnings
