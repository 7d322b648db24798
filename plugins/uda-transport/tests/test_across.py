"""COOT and UCOOT against loops of their own, and as estimators."""

from __future__ import annotations

import itertools

import numpy as np
import ot.coot
import ot.gromov
import pytest
import torch
from sklearn.base import clone
from uda_transport import COOTClassifier, UCOOTClassifier, across, memory
from uda_transport.across import agreement, cross
from uda_transport.classifiers import soft_regression
from uda_transport.coot import coot, starts, transport_cost
from uda_transport.scaling import common_scale
from uda_transport.ucoot import ucoot

import uda

SHAPES = [(1, 3, 4, 2), (2, 2, 2, 2), (5, 1, 3, 7), (8, 6, 3, 9), (13, 4, 13, 4), (7, 20, 11, 5)]


def matrices(n, d, m, e, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, d)), draw.normal(size=(m, e))


def permuted(n=12, d=7, seed=0):
    draw = np.random.default_rng(seed)
    x, rows, columns = draw.normal(size=(n, d)), draw.permutation(n), draw.permutation(d)
    return x, x[rows][:, columns], rows, columns


def spaces(n=40, m=50, classes=4, seed=0, noise=0.1):
    """Two domains of other features: class centres, seen through two random maps of columns."""
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(classes, 6)) * np.array([3, 2.5, 2, 1.5, 1, 0.5])
    out = []
    for size, width in ((n, 9), (m, 14)):
        labels = np.arange(size) % classes
        repeat = np.arange(width) % 6
        out += [hidden[labels][:, repeat] + noise * draw.normal(size=(size, width)), labels]
    return out


# ------------------------------------------------------------------------------------------------ equations


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [(0.0, 0.0), (0.3, 0.0), (0.3, 0.4)])
def test_coot_marginals_and_cost_by_loops(shape, epsilon):
    n, d, m, e = shape
    x, y = matrices(*shape)
    prior = np.random.default_rng(1).random((n, m))
    found = coot(x, y, epsilon, prior, inner_iter=5000, inner_tol=1e-9)
    p, q = found.samples, found.features
    for plan, sizes in ((p, (n, m)), (q, (d, e))):
        np.testing.assert_allclose(plan.sum(1), 1 / sizes[0], atol=1e-7)
        np.testing.assert_allclose(plan.sum(0), 1 / sizes[1], atol=1e-7)
        assert (plan >= 0).all()
    cost = entropy = 0.0
    for i in range(n):
        for j in range(m):
            for k in range(d):
                for h in range(e):
                    cost += (x[i, k] - y[j, h]) ** 2 * p[i, j] * q[k, h]
    for plan, eps in ((p, epsilon[0]), (q, epsilon[1])):
        entropy += eps * sum(v * np.log(v * plan.size) for v in plan.ravel() if v > 0)
    assert found.cost == pytest.approx(cost, abs=1e-6)
    assert transport_cost(x, y, p, q) == pytest.approx(cost, abs=1e-9)
    assert found.objective == pytest.approx(cost + entropy + (prior * p).sum(), abs=1e-6)


@pytest.mark.parametrize("epsilon", [(0.0, 0.0), (0.5, 0.5), (0.5, 0.0)])
def test_coot_is_that_of_pot(epsilon):
    x, y = matrices(9, 5, 7, 6)
    theirs = ot.coot.co_optimal_transport(
        x, y, epsilon=epsilon, nits_bcd=100, tol_sinkhorn=1e-10, nits_ot=100_000, early_stopping_tol=1e-9
    )
    ours = coot(x, y, epsilon, max_iter=100, tol=1e-9, inner_tol=1e-10, inner_iter=10_000)
    np.testing.assert_allclose(ours.samples, theirs[0], atol=1e-4)
    np.testing.assert_allclose(ours.features, theirs[1], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_permutations_are_found(seed):
    x, y, rows, columns = permuted(seed=seed)
    found = coot(x, y, (0.0, 0.0))
    assert found.converged
    assert found.cost == pytest.approx(0.0, abs=1e-9)
    np.testing.assert_array_equal(found.samples.argmax(0), rows)
    np.testing.assert_array_equal(found.features.argmax(0), columns)
    loose = ucoot(x, y, (100.0, 100.0), (0.02, 0.02), features=found.features, max_iter=20)
    np.testing.assert_array_equal(loose.samples.argmax(0), rows)


@pytest.mark.parametrize("tensor", [torch.tensor, lambda v: torch.tensor(v, dtype=torch.float32)])
def test_numpy_and_torch_agree(tensor):
    x, y = matrices(9, 5, 7, 6)
    for solve in (lambda a, b: coot(a, b, (0.3, 0.3)), lambda a, b: ucoot(a, b, (2.0, 2.0), (0.3, 0.2))):
        one, two = solve(x, y), solve(tensor(x), tensor(y))
        np.testing.assert_allclose(one.samples, two.samples.numpy(), atol=2e-4)
        np.testing.assert_allclose(one.features, two.features.numpy(), atol=2e-4)


def test_small_epsilon_does_not_underflow():
    x, y = matrices(30, 8, 25, 9)
    found = coot(30 * x, 30 * y, (0.5, 0.5), max_iter=5, inner_iter=200)  # costs of thousands: exp(-C / eps) is 0
    assert np.isfinite(found.samples).all()
    np.testing.assert_allclose(found.samples.sum(1), 1 / 30, atol=1e-6)


def test_starts_have_uniform_marginals():
    x, y = matrices(9, 5, 7, 6)
    none, *others = starts(x, y, 4)
    assert none is None
    for plan in others:
        np.testing.assert_allclose(plan.sum(1), 1 / 5)
        np.testing.assert_allclose(plan.sum(0), 1 / 6)


def test_warm_start_goes_on():
    x, y = matrices(20, 6, 15, 8)
    cold = coot(x, y, (0.3, 0.3), max_iter=200, tol=1e-7)
    warm = coot(x, y, (0.3, 0.3), start=cold, max_iter=200, tol=1e-7)
    assert warm.steps <= 3 < cold.steps
    assert warm.objective == pytest.approx(cold.objective, abs=1e-5)
    cold = ucoot(x, y, (2.0, 2.0), (0.3, 0.3), max_iter=200)
    warm = ucoot(x, y, (2.0, 2.0), (0.3, 0.3), start=cold, max_iter=200)
    assert warm.steps <= 3 < cold.steps


def test_ucoot_is_stationary_in_its_objective():
    """Scaled or moved a little, the plans cost more: the objective is written out with KL of whole products."""
    x, y = matrices(6, 3, 5, 4)
    eps, rho = (0.4, 0.3), (1.5, 0.8)
    found = ucoot(x, y, rho, eps, max_iter=2000, tol=1e-10, inner_iter=20_000, inner_tol=1e-12)

    def kl(p, q):
        return (p * np.log(p / q)).sum() - p.sum() + q.sum()

    def objective(p, q):
        pairs = itertools.product(range(6), range(5), range(3), range(4))
        cost = sum((x[i, k] - y[j, h]) ** 2 * p[i, j] * q[k, h] for i, j, k, h in pairs)
        left = kl(np.outer(p.sum(1), q.sum(1)), np.full((6, 3), 1 / 18))
        right = kl(np.outer(p.sum(0), q.sum(0)), np.full((5, 4), 1 / 20))
        entropy = eps[0] * kl(p, np.full((6, 5), 1 / 30)) + eps[1] * kl(q, np.full((3, 4), 1 / 12))
        return cost + rho[0] * left + rho[1] * right + entropy

    best = objective(found.samples, found.features)
    assert found.objective == pytest.approx(best, abs=1e-6)
    draw = np.random.default_rng(0)
    for _ in range(20):
        moved = found.samples * np.exp(0.05 * draw.normal(size=(6, 5)))
        assert objective(moved, found.features) > best
        assert objective(found.samples, found.features * np.exp(0.05 * draw.normal(size=(3, 4)))) > best


def test_pot_takes_the_epsilon_of_the_features_for_the_samples():
    """Once this fails, POT is mended, and ``ucoot`` may leave its loop to POT."""
    x, y = matrices(9, 5, 7, 6)
    solve = ot.gromov.unbalanced_co_optimal_transport
    plans = [solve(x, y, epsilon=(e, 1.0), unbalanced_solver="sinkhorn", max_iter=5)[0] for e in (0.05, 1.0)]
    np.testing.assert_array_equal(*plans)


def test_ucoot_of_equal_epsilons_is_that_of_pot():
    x, y = matrices(6, 3, 5, 4)
    theirs = ot.gromov.unbalanced_co_optimal_transport(
        x, y, reg_marginals=(1.5, 0.8), epsilon=0.4, unbalanced_solver="sinkhorn", rescale_plan=False, max_iter=2000,
        tol=1e-12, max_iter_ot=20_000, tol_ot=1e-12,
    )  # fmt: skip
    ours = ucoot(x, y, (1.5, 0.8), (0.4, 0.4), max_iter=2000, tol=1e-13, inner_iter=20_000, inner_tol=1e-12)
    np.testing.assert_allclose(ours.samples, theirs[0], atol=1e-5)
    np.testing.assert_allclose(ours.features, theirs[1], atol=1e-5)


def test_outliers_lose_mass_in_ucoot_only():
    x, labels, y, _ = spaces()
    y = np.concatenate([y, np.random.default_rng(3).normal(size=(10, y.shape[1])) * 8])
    for method, options in (("coot", {}), ("ucoot", {"reg_marginals": 0.5, "epsilon_features": 0.05})):
        found = cross(x, y, labels, 4, method=method, epsilon=0.05, normalise="centre", **options)
        kept, outlying = found.mass[:50].mean(), found.mass[50:].mean()
        assert outlying < 0.5 * kept if method == "ucoot" else outlying == pytest.approx(1, abs=1e-3)


# ----------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize(
    "classifier",
    [COOTClassifier(epsilon=0.05), UCOOTClassifier(epsilon=0.05, epsilon_features=0.05, reg_marginals=2.0)],
)
def test_few_labels_settle_the_matching(classifier):
    x, labels, y, truth = spaces()
    names = np.array(["ant", "bee", "cat", "dog"])
    known = np.full(len(y), None, dtype=object)
    known[:8] = names[truth[:8]]
    fitted = clone(classifier).fit(x, names[labels], y, known)
    assert fitted.sample_plan_.shape == (40, 50)
    assert fitted.feature_plan_.shape == (9, 14)
    assert (fitted.labels_ == names[truth]).mean() > 0.9
    unseen, _, fresh, fresh_truth = spaces(m=80, seed=0, noise=0.3)
    assert (fitted.predict(fresh) == names[fresh_truth]).mean() > 0.9
    np.testing.assert_allclose(fitted.predict_proba(fresh).sum(1), 1)
    moved = fitted.transform(unseen)
    assert moved.shape == (40, 14)
    plan = fitted.feature_plan_
    scaled = fitted.crossed_.source_scale.apply(unseen)[3]
    by_hand = [sum(plan[k, h] * scaled[k] for k in range(9)) / plan[:, h].sum() for h in range(14)]
    np.testing.assert_allclose(fitted.crossed_.target_scale.apply(moved[3]), by_hand)


def test_too_little_mass_gets_no_label():
    x, labels, y, _ = spaces()
    y = np.concatenate([y, np.random.default_rng(3).normal(size=(10, y.shape[1])) * 8])
    options = {"epsilon": 0.05, "epsilon_features": 0.05, "reg_marginals": 0.5, "normalise": "centre"}
    fitted = UCOOTClassifier(**options, min_mass=0.3).fit(x, labels, y)
    assert set(fitted.labels_[fitted.target_mass_ < 0.3]) == {-1}
    assert (fitted.labels_[fitted.target_mass_ >= 0.3] >= 0).all()
    with pytest.raises(uda.UDAError, match="lower min_mass"):
        UCOOTClassifier(**options, min_mass=50.0).fit(x, labels, y)


def test_subset_and_extension():
    x, labels, y, truth = spaces(n=120, m=160)
    known = np.full(160, -1)
    known[:12] = truth[:12]
    fitted = COOTClassifier(epsilon=0.05, max_samples=40).fit(x, labels, y, known)
    assert fitted.sample_plan_.shape == (40, 40)
    assert set(range(12)) <= set(fitted.target_rows_.tolist())
    assert set(labels[fitted.source_rows_]) == {0, 1, 2, 3}
    assert (fitted.labels_ == truth).mean() > 0.9


@pytest.mark.slow
def test_epsilon_is_chosen_by_agreement():
    x, labels, y, truth = spaces()
    found = cross(x, y, labels, 4, epsilon=None, number_of_starts=3)
    values = {t["epsilon"]: t["agreement"] for t in found.tried if "agreement" in t}
    assert set(values) == set(across.SEARCHED)
    assert found.agreement == max(values.values()) == values[found.epsilon]
    assert agreement(y, np.eye(4)[truth]) > 0.95
    assert agreement(y, np.eye(4)[np.zeros(50, dtype=int)]) == 0.0
    assert abs(agreement(y, np.eye(4)[np.random.default_rng(0).integers(0, 4, 50)])) < 0.3


def test_soft_regression_has_no_slope_left():
    draw = np.random.default_rng(0)
    x, probs, weight = draw.normal(size=(30, 4)), draw.dirichlet(np.ones(3), 30), draw.random(30)
    w, b = (torch.tensor(v, requires_grad=True) for v in soft_regression(x, probs, weight, 0.1))
    logp = (torch.tensor(x) @ w + b).log_softmax(1)
    loss = -(torch.tensor(weight)[:, None] * torch.tensor(probs) * logp).sum() / weight.sum() + 0.05 * (w**2).sum()
    loss.backward()
    assert max(w.grad.abs().max(), b.grad.abs().max()) < 1e-3


def test_scale_makes_the_product_plan_cost_one():
    x, y = matrices(9, 5, 7, 6)
    for how in ("zscore", "centre", "none"):
        sx, sy = common_scale(1000 * x + 3, y, how)
        p, q = np.full((9, 7), 1 / 63), np.full((5, 6), 1 / 30)
        assert transport_cost(sx.apply(1000 * x + 3), sy.apply(y), p, q) == pytest.approx(1)
    np.testing.assert_allclose(sx.undo(sx.apply(x)), x)


def test_bad_input(monkeypatch):
    x, labels, y, _ = spaces()
    bad = y.copy()
    bad[0, 0] = np.nan
    for match, args in [
        ("shape", (x[:, :0], labels, y)), ("NaN", (x, labels, bad)), ("constant", (x, labels, np.ones((9, 3)))),
        ("3 samples for 4 classes", (x, labels, y[:3])), ("class id", (x, labels[:-1], y)),
        ("one label", (x, labels[:, None], y)), ("source lacks", (x, labels, y, np.full(50, 9))),
    ]:  # fmt: skip
        with pytest.raises(uda.UDAError, match=match):
            COOTClassifier().fit(*args)
    fitted = COOTClassifier(max_iter=2).fit(x, labels, y)
    for call in (lambda: fitted.predict(x), lambda: fitted.transform(y)):
        with pytest.raises(uda.UDAError, match="not"):
            call()
    for options in ({"normalise": "no"}, {"max_samples": 1}):
        with pytest.raises(uda.UDAError):
            COOTClassifier(**options).fit(x, labels, y)
    with pytest.raises(uda.UDAError, match="positive"):
        UCOOTClassifier(epsilon=0.0).fit(x, labels, y)
    with pytest.raises(uda.UDAError, match="collapsed"):
        UCOOTClassifier(reg_marginals=1e-4, epsilon=0.001, epsilon_features=0.001).fit(x, labels, y)
    monkeypatch.setattr(memory, "available", lambda device="cpu": 1000)
    with pytest.raises(uda.UDAError, match="reduce the features"):
        COOTClassifier().fit(x, labels, y)


def test_memory_bounds_the_rows(monkeypatch):
    room = 2 * memory.bytes_needed(100, 8, 100, 9)
    monkeypatch.setattr(memory, "available", lambda device="cpu": room)
    rows = memory.fitting_rows((5000, 8), (4000, 9), None)
    assert 80 <= rows <= 100
    assert memory.fitting_rows((50, 8), (40, 9), None) == 50
    assert memory.available("cpu") == room
