"""BBSE and MLLS against a plain solve and another EM."""

from __future__ import annotations

import numpy as np
import pytest

from uda import UDAError
from uda.shift.priors import (
    apart,
    bbse_prior,
    bootstrap_priors,
    class_prior,
    confusion_by_class,
    mlls_prior,
    solve_prior,
    total_variation,
)

PRIOR = np.array([0.5, 0.25, 0.15, 0.1])


def sample(n, prior, seed):
    """Rows of Gaussian classes and their exact posterior under equal class shares."""
    rng = np.random.default_rng(seed)
    c = len(prior)
    y = rng.choice(c, n, p=prior)
    z = rng.normal(size=(n, c))
    z[np.arange(n), y] += 2.0
    e = np.exp(2.0 * z)  # log density ratio of two unit Gaussians that are 2 apart along an axis each
    return e / e.sum(1, keepdims=True), y


@pytest.fixture(scope="module")
def rows():
    return *sample(4000, np.full(4, 0.25), 0), *sample(4000, PRIOR, 1)


@pytest.mark.parametrize("soft", [False, True])
def test_bbse_is_the_solution_of_the_confusion_equations(rows, soft):
    source, y, target, _ = rows
    # by Lipton et al.'s weights: joint confusion C, w = C^-1 mu, q = w p_s(y); counted row by row
    c = 4
    joint, mu = np.zeros((c, c)), np.zeros(c)
    for p, label in zip(source, y, strict=True):
        told = p if soft else [float(i == int(np.argmax(p))) for i in range(c)]
        for i in range(c):
            joint[i, label] += told[i] / len(y)
    for p in target:
        told = p if soft else [float(i == int(np.argmax(p))) for i in range(c)]
        mu += np.array(told) / len(target)
    w = np.linalg.solve(joint, mu)
    q = w * np.array([(y == k).mean() for k in range(c)])
    assert q.min() > 0  # nothing to cut off, so that both variants must give this
    np.testing.assert_allclose(bbse_prior(source, y, target, soft=soft, clip=True), q / q.sum(), atol=1e-9)
    np.testing.assert_allclose(bbse_prior(source, y, target, soft=soft), q / q.sum(), atol=1e-5)


def test_bbse_stays_a_distribution_where_the_solution_is_none():
    confusion, mu = np.array([[0.9, 0.2], [0.1, 0.8]]), np.array([0.05, 0.95])  # the solution is (-0.21, 1.21)
    for clip in (False, True):
        np.testing.assert_allclose(solve_prior(confusion, mu, clip), [0, 1], atol=1e-6)


def test_bbse_of_classes_that_cannot_be_told_apart_shares_evenly():
    confusion = np.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(solve_prior(confusion, np.array([0.3, 0.3, 0.4])), [0.3, 0.3, 0.4], atol=1e-3)


def test_mlls_is_the_fixed_point_of_a_plain_em(rows):
    _, _, target, _ = rows
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    q = prior.copy()
    for _ in range(400):
        total = np.zeros(4)
        for p in target[:500]:
            r = [q[k] / prior[k] * p[k] for k in range(4)]
            total += np.array(r) / sum(r)
        q = total / 500
    np.testing.assert_allclose(mlls_prior(target[:500], prior, tol=1e-12), q, atol=1e-6)


def test_mlls_maximises_the_likelihood(rows):
    from scipy.optimize import minimize

    _, _, target, _ = rows
    prior = np.full(4, 0.25)

    def loss(free):
        q = np.exp(free) / np.exp(free).sum()
        return -np.log((target * (q / prior)).sum(1)).mean()

    free = minimize(loss, np.zeros(4), method="BFGS").x
    np.testing.assert_allclose(mlls_prior(target, prior, tol=1e-10), np.exp(free) / np.exp(free).sum(), atol=1e-4)


def test_weights_are_repetitions_of_rows(rows):
    source, y, target, _ = rows
    prior, repeat = np.full(4, 0.25), np.random.default_rng(2).integers(0, 3, 300)
    many = np.repeat(target[:300], repeat, axis=0)
    np.testing.assert_allclose(
        mlls_prior(target[:300], prior, weights=np.stack([repeat, np.ones(300)]), tol=1e-12),
        [mlls_prior(many, prior, tol=1e-12), mlls_prior(target[:300], prior, tol=1e-12)], atol=1e-6,
    )  # fmt: skip
    several = confusion_by_class(source[:300], y[:300], weights=np.stack([repeat, repeat + 1]))
    again = confusion_by_class(np.repeat(source[:300], repeat, axis=0), np.repeat(y[:300], repeat))
    np.testing.assert_allclose(several[0], again, atol=1e-12)


def test_estimates_and_intervals_hold_the_truth(rows):
    source, y, target, truth = rows
    found = bootstrap_priors(source, y, target, np.full(4, 0.25), draws=100)
    true = class_prior(truth, 4)
    for interval in found.values():
        np.testing.assert_allclose(interval.estimate, true, atol=0.04)
        assert (interval.low <= interval.estimate).all()
        assert (interval.estimate <= interval.high).all()
        assert (interval.low - 0.01 <= true).all()
        assert (true <= interval.high + 0.01).all()
        assert set(apart(interval, np.full(4, 0.25))) >= {0, 3}
    assert total_variation(true, found["mlls"].estimate) < 0.03


def test_intervals_cover_as_often_as_they_say():
    true, hit, trials = np.full(4, 0.25), {"bbse": 0, "mlls": 0}, 40
    for t in range(trials):
        (source, y), (target, _) = sample(300, true, 100 + t), sample(300, PRIOR, 500 + t)
        for name, interval in bootstrap_priors(source, y, target, true, draws=100, seed=t).items():
            hit[name] += int(((interval.low <= PRIOR) & (interval.high >= PRIOR)).sum())
    for name, count in hit.items():
        assert count / (4 * trials) > 0.85, name


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (lambda s, y, t: bbse_prior(s, np.minimum(y, 2), t), "class 3 has no held-out source row"),
        (lambda s, y, t: bbse_prior(s, y, t[:, :3]), "target probabilities must have shape"),
        (lambda s, y, t: bbse_prior(s, y, t * 2), "sum to one"),
        (lambda s, y, t: mlls_prior(t, [0.5, 0.5]), "source_prior must be 4 shares"),
        (lambda s, y, t: class_prior([-1, -1], 2), "at least one labelled row"),
    ],
)
def test_bad_input_is_named(rows, wrong, text):
    source, y, target, _ = rows
    with pytest.raises(UDAError, match=text):
        wrong(source, y, target)
