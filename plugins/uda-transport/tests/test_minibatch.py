"""Mini-batch transport losses against their equations, written a second time in numpy and plain loops."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_transport import JUMBOT, KTF, OTDA, DeepJDOT, DoubleWeighting, Sinkhorn, SlicedWasserstein, solvers
from uda_transport.sinkhorn import sinkhorn_divergence
from uda_transport.sliced import sliced_wasserstein
from uda_transport.solvers import TransportWarning, entropic_plan, exact_plan, unbalanced_plan

import uda
from uda.testing import check_plugin, check_plugins_ddp

N, M, F, C = 6, 6, 4, 3


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Fake:
    """What the plugins read of a step, with leaves to take gradients of."""

    def __init__(self, seed=0, shift=1.0, n=N, m=M, dtype=torch.float64):
        random = torch.Generator().manual_seed(seed)

        def draw(rows, width, offset=0.0):
            return (torch.randn(rows, width, generator=random, dtype=dtype) + offset).requires_grad_()

        self.source = {"features": draw(n, F), "logits": draw(n, C), "y": torch.arange(n) % C}
        self.target = SimpleNamespace(features=draw(m, F, shift), logits=draw(m, C, shift))
        self.progress = 0.5
        self.leaves = [self.source["features"], self.target.features, self.target.logits]

    def pooled(self, name):
        return self.source[name]

    def numpy(self):
        return [x.detach().double().numpy() for x in self.leaves]


def objective(plugin, step) -> torch.Tensor:
    return sum(plugin.align_features(step).values())


def costs(step) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Squared distances, cross-entropies, and squared distances of labels, in loops."""
    s, t, z = step.numpy()
    y, p = step.source["y"].tolist(), softmax(z)
    pairs = list(itertools.product(range(len(s)), range(len(t))))
    shape = (len(s), len(t))
    features = np.array([((s[i] - t[j]) ** 2).sum() for i, j in pairs]).reshape(shape)
    labels = np.array([-np.log(p[j, y[i]]) for i, j in pairs]).reshape(shape)
    squared = np.array([((np.eye(C)[y[i]] - p[j]) ** 2).sum() for i, j in pairs]).reshape(shape)
    return features, labels, squared


def assignment(cost: np.ndarray) -> np.ndarray:
    """The best permutation by trying all: the exact plan between equally many samples."""
    n = len(cost)
    best = min(itertools.permutations(range(n)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
    plan = np.zeros((n, n))
    plan[range(n), best] = 1 / n
    return plan


def unbalanced_loops(cost: np.ndarray, eps: float, tau: float, reference: np.ndarray) -> np.ndarray:
    """Generalised scaling in the probability domain, on the cost as it is (Chizat et al., 2018)."""
    n, m = cost.shape
    kernel, v, power = reference * np.exp(-cost / eps), np.ones(m), tau / (tau + eps)
    for _ in range(5000):
        u = ((1 / n) / (kernel @ v)) ** power
        v = ((1 / m) / (kernel.T @ u)) ** power
    return u[:, None] * kernel * v


def sinkhorn_loops(cost: np.ndarray, eps: float) -> tuple[np.ndarray, float]:
    """Plan and entropic cost by plain scaling in the probability domain."""
    n, m = cost.shape
    kernel, v = np.exp(-cost / eps) / (n * m), np.ones(m)
    for _ in range(5000):
        u = (1 / n) / (kernel @ v)
        v = (1 / m) / (kernel.T @ u)
    plan = u[:, None] * kernel * v
    return plan, (plan * cost).sum() + eps * (plan * np.log(plan * n * m)).sum()


def expected_gradients(step, plan, alpha, label_weight):
    """Gradients of ``sum P C`` with P held fixed, by hand."""
    s, t, z = step.numpy()
    y, p = step.source["y"].numpy(), softmax(z)
    on_s = 2 * alpha * sum(plan[:, [j]] * (s - t[j]) for j in range(len(t)))
    on_t = 2 * alpha * sum(plan[[i]].T * (t - s[i]) for i in range(len(s)))
    on_z = label_weight * sum(plan[[i]].T * (p - np.eye(C)[y[i]]) for i in range(len(s)))
    return on_s, on_t, on_z


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("plan_labels", ["cross_entropy", "squared"])
def test_deepjdot(plan_labels):
    step = Fake()
    features, labels, squared = costs(step)
    trained = 0.2 * features + 0.7 * labels
    plan = assignment(0.2 * features + 0.7 * (labels if plan_labels == "cross_entropy" else squared))
    got = objective(DeepJDOT(weight=0.5, alpha=0.2, label_weight=0.7, plan_labels=plan_labels), step)
    assert got.item() == pytest.approx(0.5 * (plan * trained).sum(), rel=1e-9)
    grads = torch.autograd.grad(got, step.leaves)
    for g, e in zip(grads, expected_gradients(step, plan, 0.2, 0.7), strict=True):
        np.testing.assert_allclose(g.numpy(), 0.5 * e, atol=1e-10)


@pytest.mark.parametrize("reference", ["product", "ones"])
def test_jumbot(reference):
    step = Fake(n=5, m=4)
    features, labels, _ = costs(step)
    cost = 0.1 * features + 0.4 * labels
    measure = np.full(cost.shape, 1 / cost.size if reference == "product" else 1.0)
    plan = unbalanced_loops(cost, 0.1, 0.5, measure)
    assert 0.01 < plan.sum() < 0.95 or reference == "ones"  # some mass is left behind
    plugin = JUMBOT(eta1=0.1, eta2=0.4, tau=0.5, epsilon=0.1, reference=reference, tol=1e-12, max_iter=10000)
    got = objective(plugin, step)
    assert got.item() == pytest.approx((plan * cost).sum(), rel=1e-5)
    for g, e in zip(torch.autograd.grad(got, step.leaves), expected_gradients(step, plan, 0.1, 0.4), strict=True):
        np.testing.assert_allclose(g.numpy(), e, atol=1e-6)


def test_unbalanced_plan_where_a_plain_kernel_underflows():
    """A row 20 above the rest is exp(-2000) at eps 0.01: zero in float64, but not so the plan's meaning."""
    cost = torch.rand(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cost[0] += 20
    plan = unbalanced_plan(cost, 0.01, 0.5, tol=1e-10, max_iter=20000)
    rest = unbalanced_plan(cost[1:] + 0.0, 0.01, 0.5, tol=1e-10, max_iter=20000)
    assert torch.isfinite(plan).all()
    assert float(plan[0].sum()) < 1e-6 < float(plan[1:].sum())
    assert plan[1:].sum(1).gt(0.01 * rest.sum() / 5).all()  # the other rows live
    # first-order conditions: eps log(P / R) + tau log(P1 / a) + tau log(PT1 / b) + C = 0
    gap = (
        0.01 * (plan[1:] * 30).log() + 0.5 * (plan[1:].sum(1, keepdim=True) * 6).log()
        + 0.5 * (plan.sum(0) * 5).log() + cost[1:]
    )  # fmt: skip
    assert gap[plan[1:] > 1e-12].abs().max() < 1e-6


def test_sample_without_its_like_gets_little_mass():
    cost = torch.tensor([[0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])
    assert unbalanced_plan(cost, 0.05, 0.3)[2].sum() < 0.02 * unbalanced_plan(cost, 0.05, 0.3)[0].sum()
    assert exact_plan(cost)[2].sum() == pytest.approx(1 / 3)


@pytest.mark.parametrize("debias", [True, False])
def test_sinkhorn(debias):
    step = Fake(n=5, m=7)
    s, t, _ = step.numpy()

    def squared(x, y):
        return np.array([[((a - b) ** 2).sum() for b in y] for a in x])

    eps = 0.2 * squared(s, t).mean()
    (st, value), (ss, own_s), (_, own_t) = (sinkhorn_loops(squared(x, y), eps) for x, y in ((s, t), (s, s), (t, t)))
    on_s = 2 * (st.sum(1, keepdims=True) * s - st @ t)
    if debias:
        value -= (own_s + own_t) / 2
        on_s -= ss.sum(1, keepdims=True) * s - ss @ s + ss.sum(0)[:, None] * s - ss.T @ s
    got = objective(Sinkhorn(weight=0.5, epsilon=0.2, debias=debias, tol=1e-12), step)
    assert got.item() == pytest.approx(0.5 * value, rel=1e-8)
    grad = torch.autograd.grad(got, step.source["features"])[0].numpy()
    np.testing.assert_allclose(grad, 0.5 * on_s, atol=1e-7)


def test_sinkhorn_divergence_is_zero_on_equal_batches_only_and_scales():
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = torch.randperm(8)
    assert float(sinkhorn_divergence(x, x[order])) == pytest.approx(0, abs=1e-6)
    far = float(sinkhorn_divergence(x, x + 2))
    assert far == pytest.approx(12, rel=1e-3)  # a shift by d costs |d|^2
    assert float(sinkhorn_divergence(3 * x, 3 * x + 6)) == pytest.approx(9 * far, rel=1e-5)


@pytest.mark.parametrize(("n", "m"), [(6, 6), (4, 6)])
def test_sliced(n, m):
    step = Fake(n=n, m=m)
    directions = torch.nn.functional.normalize(torch.randn(F, 5, dtype=torch.float64), dim=0)
    s, t, _ = step.numpy()
    along = []
    for theta in directions.T.numpy():  # repeat each sample until both sides have equally many, then sort
        least = np.lcm(n, m)
        a, b = (np.sort(np.repeat(x @ theta, least // len(x))) for x in (s, t))
        along.append(((a - b) ** 2).mean())
    args = step.source["features"], step.target.features, directions
    assert float(sliced_wasserstein(*args)) == pytest.approx(np.mean(along), rel=1e-6)
    assert float(sliced_wasserstein(*args, "max")) == pytest.approx(np.max(along), rel=1e-6)


@pytest.mark.parametrize("rows", [32, 33, 65, 100])
def test_sliced_in_float32_pairs_the_ranks(rows):
    x, y = (torch.randn(rows, 3, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    direction = torch.eye(3)
    by_sorting = (x.sort(0).values - y.sort(0).values).square().mean()
    assert float(sliced_wasserstein(x, y, direction)) == pytest.approx(float(by_sorting), rel=1e-5)


def test_sliced_directions_follow_the_seed():
    plugin, values = SlicedWasserstein(projections=3), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        values.append(float(objective(plugin, Fake())))
    assert values[0] == values[1] != values[2]


# ------------------------------------------------------------------------------------------- what they do

LOSSES = {
    "deepjdot": (DeepJDOT, {"alpha": 0.1}),
    "jumbot": (JUMBOT, {"eta1": 0.1, "eta2": 0.1, "tau": 1.0, "epsilon": 0.1}),
    "sinkhorn": (Sinkhorn, {"weight": 0.1}),
    "sliced": (SlicedWasserstein, {}),
    "sliced_max": (SlicedWasserstein, {"reduce": "max"}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "sinkhorn" else n for n in LOSSES]
)
def test_descent_brings_the_domains_together(name):
    cls, init_args = LOSSES[name]
    step, plugin = Fake(shift=2.0, n=12, m=12), cls(**init_args)
    optimiser = torch.optim.SGD([step.target.features, step.target.logits], lr=5.0)

    def gap():
        return float(sinkhorn_divergence(step.source["features"], step.target.features).detach())

    before = gap()
    torch.manual_seed(0)
    for _ in range(60):
        optimiser.zero_grad()
        objective(plugin, step).backward()
        optimiser.step()
    assert gap() < 0.5 * before


@pytest.mark.parametrize("name", ["deepjdot", "jumbot"])
def test_labels_travel(name):
    """Target clusters that lie near source classes take over their labels."""
    cls, init_args = LOSSES[name]
    step = Fake(n=12, m=12)
    with torch.no_grad():
        step.source["features"][:] = torch.nn.functional.one_hot(step.source["y"], F) * 4.0
        step.target.features[:] = step.source["features"] + 0.3
        step.target.logits.zero_()
    optimiser = torch.optim.SGD([step.target.logits], lr=1.0)
    for _ in range(50):
        optimiser.zero_grad()
        objective(cls(**{**init_args, "weight": 5.0}), step).backward()
        optimiser.step()
    assert (step.target.logits.argmax(1) == step.source["y"]).all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_inputs(name):
    cls, init_args = LOSSES[name]
    values = []
    for dtype in (torch.float32, torch.bfloat16):
        step = Fake(dtype=torch.float32)
        step.source["features"] = step.source["features"].to(dtype)
        step.target.features, step.target.logits = step.target.features.to(dtype), step.target.logits.to(dtype)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            values.append(objective(cls(**init_args), step))
        assert values[-1].dtype == torch.float32
    assert float(values[1]) == pytest.approx(float(values[0]), rel=0.02)


# ------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("plan", [exact_plan, lambda c: unbalanced_plan(c, 0.1, 1.0), lambda c: entropic_plan(c, 0.1)])
def test_costs_that_are_not_finite_are_refused(plan):
    cost = torch.rand(4, 4)
    cost[0, 0] = torch.nan
    with pytest.raises(uda.UDAError, match="finite"):
        plan(cost)


@pytest.mark.parametrize(
    "plan", [lambda c: unbalanced_plan(c, 0.01, 10.0, max_iter=2), lambda c: entropic_plan(c, 0.001, max_iter=2)]
)
def test_a_solver_that_stops_early_says_so_once(plan):
    solvers.warn_once.cache_clear()
    cost = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    with pytest.warns(TransportWarning, match="stopped before"):
        plan(cost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.isfinite(plan(cost)).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: DeepJDOT(alpha=-1.0), lambda: DeepJDOT(alpha=0.0, label_weight=0.0), lambda: DeepJDOT(plan_labels="ce"),
        lambda: JUMBOT(tau=0.0), lambda: JUMBOT(reference="one"), lambda: Sinkhorn(epsilon=0.0), lambda: Sinkhorn(-1.0),
        lambda: SlicedWasserstein(projections=0), lambda: SlicedWasserstein(reduce="sum"),
        lambda: SlicedWasserstein(ramp="steep"),
    ],
)  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(uda.UDAError):
        make()


# --------------------------------------------------------------------------------------------------- lifecycle


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("jumbot", "sinkhorn", "sliced")]


@pytest.mark.parametrize("name", ["deepjdot", *SLOW])
def test_plugin(name):
    cls, init_args = LOSSES[name]
    report = check_plugin(cls, init_args=init_args, sources=2 if name == "deepjdot" else 1, ddp=False)
    assert not report.warnings


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp([
        (DeepJDOT, {}), (JUMBOT, {}), (Sinkhorn, {}), (SlicedWasserstein, {"init_args": {"projections": 8}}), (KTF, {}),
        (OTDA, {"init_args": {"method": "sinkhorn", "max_samples": 20}}),
        (DoubleWeighting, {"init_args": {"max_samples": 20}}),
    ])  # fmt: skip
