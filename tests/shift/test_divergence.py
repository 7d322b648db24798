"""Distances between samples against plain loops, and their behaviour with and without a shift."""

from __future__ import annotations

import math

import numpy as np
import pytest

from uda import UDAError
from uda.shift.divergence import domain_classifier, match_prior, mmd, novelty, output_shift, proxy_a_distance


def normal(n, f=6, seed=0, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).normal(size=(n, f))


def test_mmd_by_loops():
    s, t = normal(14, 3, 0), normal(9, 3, 1, shift=0.5)
    both = np.concatenate((s, t))
    s_, t_ = ((z - both.mean(0)) / both.std(0) for z in (s, t))
    k = lambda a, b: math.exp(-sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) / (2 * 1.3**2))  # noqa: E731
    ss = sum(k(a, b) for i, a in enumerate(s_) for j, b in enumerate(s_) if i != j) / (14 * 13)
    tt = sum(k(a, b) for i, a in enumerate(t_) for j, b in enumerate(t_) if i != j) / (9 * 8)
    st = sum(k(a, b) for a in s_ for b in t_) / (14 * 9)
    found = mmd(s, t, permutations=99, bandwidth=1.3)
    assert found.mmd2 == pytest.approx(ss + tt - 2 * st, abs=1e-5)  # the kernel is kept in single precision
    assert (found.source_rows, found.target_rows) == (14, 9)


def test_mmd_bandwidth_is_the_median_distance():
    s, t = normal(15, 2, 0), normal(15, 2, 1)
    both = np.concatenate((s, t))
    z = (both - both.mean(0)) / both.std(0)
    distances = [math.dist(z[i], z[j]) for i in range(30) for j in range(i)]
    assert mmd(s, t, permutations=99).bandwidth == pytest.approx(float(np.median(distances)), rel=1e-6)


def test_mmd_p_value_by_relabelling_one_by_one():
    s, t = normal(12, 2, 0), normal(12, 2, 1, shift=0.6)
    found = mmd(s, t, permutations=400, bandwidth=1.0)
    both, rng = np.concatenate((s, t)), np.random.default_rng(5)
    z = (both - both.mean(0)) / both.std(0)
    kernel = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / 2)

    def value(order):
        a, b = order[:12], order[12:]
        own = [(kernel[np.ix_(g, g)].sum() - 12) / (12 * 11) for g in (a, b)]
        return sum(own) - 2 * kernel[np.ix_(a, b)].mean()

    real = value(np.arange(24))
    as_large = np.mean([value(rng.permutation(24)) >= real for _ in range(400)])
    assert found.p_value == pytest.approx(as_large, abs=0.06)


@pytest.mark.slow
def test_p_values_are_even_without_a_shift():
    small = {"mmd": 0, "linear": 0, "trees": 0}
    for t in range(30):
        s, u = normal(120, 4, 2 * t), normal(120, 4, 2 * t + 1)
        small["mmd"] += mmd(s, u, permutations=99, seed=t).p_value < 0.1
        small["linear"] += domain_classifier(s, u, "linear", seed=t).p_value < 0.1
        if t < 6:
            small["trees"] += domain_classifier(s, u, "trees", seed=t).p_value < 0.02
    assert small["mmd"] <= 8  # 3 expected; more than 8 has a chance of 0.2 %
    assert small["linear"] <= 8
    assert small["trees"] <= 1


def test_proxy_a_distance_of_shifted_gaussians():
    assert [proxy_a_distance(e) for e in (0.0, 0.25, 0.5)] == [2.0, 1.0, 0.0]
    s, t = normal(1500, 3, 0), normal(900, 3, 1)
    t[:, 0] += 2.0
    found = domain_classifier(s, t, "linear")
    best = 0.5 * math.erfc(1 / math.sqrt(2))  # the best error for means 2 apart: 0.159
    assert found.error == pytest.approx(best, abs=0.02)
    assert found.pad == pytest.approx(2 * (1 - 2 * found.error))
    assert found.pad_low < 2 * (1 - 2 * best) < found.pad_high
    assert found.p_value < 1e-10
    assert (found.source_rows, found.target_rows) == (1500, 900)


def test_the_error_is_that_of_cross_validation():
    from sklearn.linear_model import LogisticRegression

    s, t = normal(90, 3, 0), normal(60, 3, 1, shift=0.7)
    rng = np.random.default_rng(4)
    part_s, part_t = rng.permutation(np.arange(90) % 3), rng.permutation(np.arange(60) % 3)
    wrong_s = wrong_t = 0
    for k in range(3):
        a, b = s[part_s != k], t[part_t != k]
        x = np.concatenate((a, b))
        mean, std = x.mean(0), x.std(0)
        weight = [len(x) / (2 * len(a))] * len(a) + [len(x) / (2 * len(b))] * len(b)  # domains count alike
        model = LogisticRegression(C=0.1, max_iter=1000).fit((x - mean) / std, [0] * len(a) + [1] * len(b), weight)
        wrong_s += int((model.predict((s[part_s == k] - mean) / std) == 1).sum())
        wrong_t += int((model.predict((t[part_t == k] - mean) / std) == 0).sum())
    found = domain_classifier(s, t, "linear", seed=4)
    assert found.error == pytest.approx((wrong_s / 90 + wrong_t / 60) / 2, abs=0.012)


def test_trees_see_what_moves_no_mean():
    s, t = normal(600, 4, 0), normal(600, 4, 1, scale=2.0)
    s, t = s - s.mean(0), t - t.mean(0)
    assert domain_classifier(s, t, "trees").error < 0.35
    assert domain_classifier(s, t, "linear").error > 0.42


def test_small_domains_count_as_much_as_large_ones():
    found = domain_classifier(normal(3000, 3, 0), normal(60, 3, 1), "linear")
    assert 0.35 < found.error < 0.65  # "always source" would err in 2 % of the rows and in half of the domains


def test_output_shift_by_sorted_values():
    a, b = np.random.default_rng(0).dirichlet([1, 1, 1], 50), np.random.default_rng(1).dirichlet([3, 1, 1], 40)
    gaps = []
    for c in range(3):
        points = np.concatenate((a[:, c], b[:, c]))
        gaps.append(max(abs((a[:, c] <= p).mean() - (b[:, c] <= p).mean()) for p in points))
    found = output_shift(a, b)
    assert found["statistic"] == pytest.approx(max(gaps))
    assert found["p_value"] < 0.01
    assert output_shift(a, np.random.default_rng(2).dirichlet([1, 1, 1], 40))["p_value"] > 0.05


def test_matched_rows_have_the_prior():
    y = np.repeat([0, 1, 2], [3000, 2000, 1000])
    rows = match_prior(y, [0.1, 0.6, 0.3])
    share = np.bincount(y[rows], minlength=3) / len(rows)
    np.testing.assert_allclose(share, [0.1, 0.6, 0.3], atol=0.03)
    assert len(np.unique(rows)) == len(rows)


def test_novelty_tells_a_strange_part_from_a_move_of_all():
    fit, held, like = (normal(400, 5, s) for s in (0, 1, 2))
    alike = novelty(fit, held, like)
    assert alike["far"] < 0.05
    assert alike["flat"] == pytest.approx(1.0, abs=0.35)
    assert sum(alike["ranks"].values()) == pytest.approx(1.0)
    part = novelty(fit, held, np.concatenate((like[:280], normal(120, 5, 3, shift=4.0))))
    assert part["far"] == pytest.approx(0.3, abs=0.08)
    assert part["flat"] > 0.7
    assert novelty(fit, held, normal(400, 5, 4, shift=1.5))["flat"] < 0.6


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mmd(normal(5, 3), normal(5, 4)), "3 and 4 features"),
        (lambda: domain_classifier(normal(3), normal(50)), "first sample must be"),
        (lambda: domain_classifier(normal(30), normal(30), "forest"), "must be 'linear' or 'trees'"),
    ],
)
def test_bad_input_is_named(call, text):
    with pytest.raises(UDAError, match=text):
        call()
