"""DW-GCS and KTF: their programmes solved again by other means, and what they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from uda_transport import KTF, DoubleWeighting, DWGCSClassifier, KTFClassifier
from uda_transport.ktf import mean_discrepancy, noise_domain
from uda_transport.minimax import learn_log, learn_zero_one, moments, tolerance, worst_sets
from uda_transport.weighting import double_weights, gaussian_gram, median_width

import uda
from uda.testing import check_plugin


def shifted(n=60, m=50, seed=0, shift=1.2):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, 2)), draw.normal(size=(m, 2)) * 0.7 + shift


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("leave", [0.0, 0.3])
def test_weights_solve_the_quadratic_programme(leave):
    (x, t), n, m = shifted(16, 12), 16, 12
    b, a = double_weights(x, t, leave, 1.0)
    kernel = np.array([[np.exp(-((u - v) ** 2).sum() / 2) for v in [*x, *t]] for u in [*x, *t]])
    np.testing.assert_allclose(gaussian_gram(np.r_[x, t], np.r_[x, t], 1.0), kernel, atol=1e-12)

    def distance(w):
        z = np.r_[w[:n] / n, -w[n:] / m]
        return z @ kernel @ z

    slack = 1 - n**-0.5
    other = minimize(
        distance, np.ones(n + m), method="SLSQP", options={"maxiter": 500, "ftol": 1e-12},
        bounds=[(0, 1000 * (1 - leave))] * n + [(0.0 if leave else 1.0, 1.0)] * m,
        constraints=[
            {"type": "ineq", "fun": lambda w: slack - (w[:n].mean() - w[n:].mean())},
            {"type": "ineq", "fun": lambda w: slack + (w[:n].mean() - w[n:].mean())},
            {"type": "ineq", "fun": lambda w: leave**2 * m - ((w[n:] - 1) ** 2).sum()},
        ],
    )  # fmt: skip
    assert other.success
    assert distance(np.r_[b, a]) == pytest.approx(other.fun, rel=1e-3, abs=1e-6)
    assert b.min() >= 0
    assert a.max() <= 1
    assert abs(b.mean() - a.mean()) <= slack + 1e-4
    assert np.sqrt(((a - 1) ** 2).mean()) <= leave + 1e-3


def test_test_samples_far_from_all_training_samples_count_less():
    x, t = shifted(60, 40, shift=0.5)
    t[:6] += 20.0
    _, a = double_weights(x, t, 0.4, median_width(x))
    assert a[:6].mean() < a[6:].mean() - 0.3


# ------------------------------------------------------------------------------------------------ minimax


def test_worst_sets_against_all_subsets():
    scores = np.random.default_rng(0).normal(size=(20, 5))
    found, sets = worst_sets(scores)
    for row, value, chosen in zip(scores, found, sets, strict=True):
        subsets = [s for k in range(1, 6) for s in itertools.combinations(range(5), k)]
        best = max(subsets, key=lambda s: (sum(row[list(s)]) - 1) / len(s))
        assert value == pytest.approx((sum(row[list(best)]) - 1) / len(best))
        assert set(np.flatnonzero(chosen)) == set(best)


def problem(n=25, m=20, f=3, c=3, seed=0):
    draw = np.random.default_rng(seed)
    x, t, y = draw.normal(size=(n, f)), draw.normal(size=(m, f)) + 0.3, draw.integers(0, c, n)
    b, a = draw.random(n) * 2, draw.random(m)
    tau = moments(x, y, c, b)
    naive = np.zeros((c, f))
    for i in range(n):
        naive[y[i]] += b[i] * x[i] / n
    np.testing.assert_allclose(tau, naive, atol=1e-12)
    return t, a, tau


def test_tolerance_is_the_least_that_is_feasible():
    """By its dual: at the optimum a labelling reaches each moment within lambda, and no coordinate can be less."""
    t, a, tau = problem()
    m, c = len(t), len(tau)
    lam = tolerance(t, a, tau)

    def gap(flat):  # least l1 distance of moments over labellings, a smooth stand-in for the linear programme
        p = np.exp(flat.reshape(m, c))
        p = p / p.sum(1, keepdims=True) / m
        return np.sqrt((np.einsum("ij,i,if->jf", p, a, t) - tau) ** 2 + 1e-10).sum()

    other = min((minimize(gap, s, method="L-BFGS-B", options={"maxiter": 3000}) for s in
                 np.random.default_rng(1).normal(size=(3, m * c))), key=lambda r: r.fun)  # fmt: skip
    assert lam.min() >= 0
    assert lam.sum() == pytest.approx(other.fun, rel=0.05, abs=2e-3)


@pytest.mark.parametrize("loss", ["log", "0-1"])
def test_learning_reaches_the_minimum_of_its_objective(loss):
    t, a, tau = problem()
    lam = tolerance(t, a, tau) + 0.02
    mu, least = (learn_log if loss == "log" else learn_zero_one)(t, a, tau, lam)

    def objective(mu):
        total = 0.0
        for i in range(len(t)):
            scores = [a[i] * t[i] @ mu[j] for j in range(3)]
            if loss == "log":
                total += np.log(sum(np.exp(scores)))
            else:
                subsets = [s for k in (1, 2, 3) for s in itertools.combinations(range(3), k)]
                total += 1 + max((sum(scores[j] for j in s) - 1) / len(s) for s in subsets)
        return total / len(t) - (tau * mu).sum() + (lam * abs(mu)).sum()

    assert objective(mu) == pytest.approx(least, abs=1e-5)
    draw = np.random.default_rng(2)
    for scale in (1e-3, 1e-2, 0.1, 1.0):  # convex: no step from the minimum goes down
        assert all(objective(mu + scale * draw.normal(size=mu.shape)) >= least - 1e-6 for _ in range(20))


@pytest.mark.parametrize("loss", ["log", "0-1"])
def test_covariate_shift(loss):
    """A curved boundary, whose tangent where the target lies is not that where the source lies."""
    draw = np.random.default_rng(0)

    def sample(n, centre):
        x = draw.normal(size=(n, 2)) * 0.7 + centre
        return x, np.where(np.sin(2 * x[:, 0]) + 0.2 * draw.normal(size=n) > x[:, 1], "below", "above")

    (x, y), (t, truth) = sample(120, [0, 0]), sample(80, [1, 0.5])
    plain = (LogisticRegression().fit(x, y).predict(t) == truth).mean()
    fitted = clone(DWGCSClassifier(loss=loss, grid=(0.0, 0.4))).fit(x, y, t)
    assert (fitted.predict(t) == truth).mean() > plain + 0.05
    assert fitted.leave_ in (0.0, 0.4)
    assert fitted.source_weight_.shape == (120,)
    assert fitted.target_weight_.shape == (80,)
    assert DWGCSClassifier(loss=loss, leave=0.0).fit(x, y, t).risk_ >= fitted.risk_ - 1e-9


# ------------------------------------------------------------------------------------------------ KTF


def test_mean_discrepancy_by_loops():
    draw = torch.Generator().manual_seed(0)
    s, t = torch.randn(9, 4, generator=draw).double(), torch.randn(7, 4, generator=draw).double()
    y, p = torch.tensor([0, 1, 2] * 3), torch.rand(7, 3, generator=draw).double().softmax(1)
    total = ((s.mean(0) - t.mean(0)) ** 2).sum()
    for c in range(3):
        mean_s = sum(s[i] for i in range(9) if y[i] == c) / 3
        mean_t = sum(p[i, c] * t[i] for i in range(7)) / sum(p[i, c] for i in range(7))
        total = total + ((mean_s - mean_t) ** 2).sum()
    assert float(mean_discrepancy(s, y, t, p)) == pytest.approx(float(total / 4))


def test_ktf_learns_from_few_labels_and_a_source_of_noise():
    draw = np.random.default_rng(0)
    centres = draw.normal(size=(4, 15))
    truth = np.arange(80) % 4
    t = centres[truth] + 0.8 * draw.normal(size=(80, 15))
    known = np.where(np.arange(80) < 12, truth, -1)
    x, y = noise_domain(4, dim=32, each=20)
    assert x.shape == (80, 32)
    assert np.bincount(y).tolist() == [20] * 4
    fitted = clone(KTFClassifier(dim=32, lr=3e-2, steps=60)).fit(x, y, t, known)
    free = known < 0
    assert (fitted.labels_[free] == truth[free]).mean() > 0.8
    assert fitted.predict_proba(t).shape == (80, 4)
    apart = KTFClassifier(dim=32, lr=3e-2, steps=60, mu=0.0).fit(x, y, t, known)
    means = [torch.tensor(f.predict_proba(t)) for f in (fitted, apart)]
    assert not torch.allclose(*means, atol=1e-3)  # the discrepancy does something


# ------------------------------------------------------------------------------------------------ in training


def test_weights_are_one_in_the_mean_and_follow_the_target():
    from types import SimpleNamespace

    draw = np.random.default_rng(0)
    near, far = draw.normal(size=(30, 3)), draw.normal(size=(30, 3)) + 3.0
    model = SimpleNamespace(source_names=["s"], sizes={"s": 60}, base_seed=0)
    plugin = DoubleWeighting(leave=0.0, max_samples=40)
    plugin.build(model)
    pools = SimpleNamespace(
        sources={"s": SimpleNamespace(features=torch.tensor(np.r_[near, far]))},
        target=SimpleNamespace(features=torch.tensor(draw.normal(size=(50, 3)))),
    )
    assert torch.equal(plugin.weights(model, "s"), torch.ones(60))
    plugin.refresh(model, pools)
    found = plugin.weights(model, "s")
    assert float(found.mean()) == pytest.approx(1, abs=1e-5)
    assert float(found[:30].mean()) > 5 * float(found[30:].mean())
    batch = SimpleNamespace(index=torch.tensor([3, 40]), weight=None)
    plugin.prepare_batch(SimpleNamespace(model=model, sources={"s": batch}))
    assert torch.equal(batch.weight, found[[3, 40]])


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options"), [(KTF, {}), (DoubleWeighting, {"max_samples": 20})])
def test_plugin(cls, options):
    check_plugin(cls, init_args=options, ddp=False)


def test_bad_input():
    x, t = shifted(12, 10)
    y = np.arange(12) % 2
    hole = t.copy()
    hole[0, 0] = np.nan
    known = np.full(10, -1)
    known[:2] = [0, 1]
    stray = known.copy()
    stray[2] = 7
    for match, call in [
        ("leave must be", lambda: double_weights(x, t, 1.0)),
        ("one width", lambda: double_weights(x, t[:, :1])),
        ("two classes", lambda: DWGCSClassifier().fit(x, np.zeros(12), t)),
        ("NaN", lambda: DWGCSClassifier().fit(x, y, hole)),
        ("labels", lambda: DWGCSClassifier().fit(x, y[:-1], t)),
        ("loss", lambda: DWGCSClassifier(loss="hinge").fit(x, y, t)),
        ("NaN", lambda: KTFClassifier().fit(x, y, hole, known)),
        ("'7', which the source lacks", lambda: KTFClassifier().fit(x, y, t, stray)),
        ("needs labelled", lambda: KTFClassifier().fit(x, y, t, np.full(10, -1))),
        ("most above 1", lambda: DoubleWeighting(most=0.5)),
        ("-1 for unknown", lambda: KTFClassifier().fit(x, y, t, known[:-1])),
    ]:
        with pytest.raises(uda.UDAError, match=match):
            call()
    fitted = DWGCSClassifier(leave=0.0).fit(x, y, t)
    with pytest.raises(uda.UDAError, match="2 features"):
        fitted.predict(t[:, :1])
