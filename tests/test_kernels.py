"""Kernels and estimates of the MMD against plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import uda
from uda.kernels import (
    adaptive_kernel,
    discrepancy,
    gaussian_kernel,
    mean_distance,
    multi_kernel_mmd,
    squared_distances,
)


def kernel_loops(x: np.ndarray, kernels=5, factor=2.0) -> np.ndarray:
    """``sum_a exp(-|x_i - x_j|^2 / (2 alpha_a v))``, v the mean over distinct pairs, alpha = 2^-3 ... 2^1."""
    n = len(x)
    d = [[sum((a - b) ** 2 for a, b in zip(x[i], x[j], strict=True)) for j in range(n)] for i in range(n)]
    v = sum(d[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    alphas = [factor ** (a - kernels // 2) / 2 for a in range(kernels)]
    return np.array([[sum(math.exp(-d[i][j] / (2 * a * v)) for a in alphas) for j in range(n)] for i in range(n)])


def mmd_loops(k: np.ndarray, n: int, estimator: str) -> float:
    """The estimate from sums over samples."""
    s, t = list(range(n)), list(range(n, len(k)))
    m = len(t)
    cross = sum(k[i][j] for i in s for j in t) / (n * m)
    if estimator == "biased":
        return sum(k[i][j] for i in s for j in s) / n**2 + sum(k[i][j] for i in t for j in t) / m**2 - 2 * cross
    if estimator == "unbiased":
        inner = sum(k[i][j] for i in s for j in s if i != j) / (n * (n - 1))
        return inner + sum(k[i][j] for i in t for j in t if i != j) / (m * (m - 1)) - 2 * cross
    assert n == m
    pairs = [(i, i + 1) for i in range(0, n - 1, 2)] if estimator == "linear" else [(i, (i + 1) % n) for i in range(n)]
    h = [k[s[i]][s[j]] + k[t[i]][t[j]] - k[s[i]][t[j]] - k[s[j]][t[i]] for i, j in pairs]
    return sum(h) / len(h)


def mmd_by_loops(source: torch.Tensor, target: torch.Tensor, estimator: str, **options) -> float:
    x = np.concatenate([source.detach().double().numpy(), target.detach().double().numpy()])
    return mmd_loops(kernel_loops(x, **options), len(source), estimator)


def samples(n=6, m=6, f=4, shift=1.0, dtype=torch.float64):
    random = torch.Generator().manual_seed(0)
    return torch.randn(n, f, generator=random, dtype=dtype), torch.randn(m, f, generator=random, dtype=dtype) + shift


@pytest.mark.parametrize(("kernels", "factor"), [(5, 2.0), (1, 2.0), (3, 1.5)])
def test_kernel_against_loops(kernels, factor):
    x = torch.cat(samples(4, 3))
    np.testing.assert_allclose(adaptive_kernel(x, kernels, factor), kernel_loops(x.numpy(), kernels, factor), rtol=1e-9)


def test_fixed_width():
    """One kernel of variance 2 s^2 is exp(-D / (2 s^2))."""
    d = torch.rand(3, 3, dtype=torch.float64)
    torch.testing.assert_close(gaussian_kernel(d, 2 * 0.92**2, kernels=1), torch.exp(-d / (2 * 0.92**2)))


@pytest.mark.parametrize("estimator", ["linear", "circular", "unbiased", "biased"])
@pytest.mark.parametrize("n", [6, 5])
def test_estimates_against_loops(estimator, n):
    source, target = samples(n, n)
    got = discrepancy(adaptive_kernel(torch.cat([source, target])), n, estimator)
    assert float(got) == pytest.approx(mmd_by_loops(source, target, estimator), rel=1e-9)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
def test_unequal_domains_against_loops(estimator):
    source, target = samples(7, 3)
    got = discrepancy(adaptive_kernel(torch.cat([source, target])), 7, estimator)
    assert float(got) == pytest.approx(mmd_by_loops(source, target, estimator), rel=1e-9)


@pytest.mark.parametrize("estimator", ["linear", "circular"])
def test_pairs_of_unequal_domains_are_spread_over_the_larger(estimator):
    """Two pooled sources of four rows against four target rows: rows 0, 2, 4, 6 stand for them."""
    source, target = samples(8, 4)
    kernel = adaptive_kernel(torch.cat([source, target]))
    keep = [0, 2, 4, 6, *range(8, 12)]
    chosen = kernel[keep][:, keep].numpy()
    assert float(discrepancy(kernel, 8, estimator)) == pytest.approx(mmd_loops(chosen, 4, estimator), rel=1e-9)
    swapped = [8, 9, 10, 11, *range(8)]
    other = discrepancy(kernel[swapped][:, swapped], 4, estimator)
    assert float(other) == pytest.approx(mmd_loops(chosen, 4, estimator), rel=1e-9)


def test_unbiased_estimates_are_zero_in_the_mean():
    """Over many draws from one distribution the mean of the unbiased estimates is near 0, the biased one is above."""
    random = torch.Generator().manual_seed(1)
    means = {"linear": [], "circular": [], "unbiased": [], "biased": []}
    for _ in range(200):
        kernel = adaptive_kernel(torch.randn(32, 3, generator=random))
        for name, found in means.items():
            found.append(float(discrepancy(kernel, 16, name)))
    z = {name: np.mean(found) / np.std(found) * 200**0.5 for name, found in means.items()}
    assert all(abs(z[name]) < 4 for name in ("linear", "circular", "unbiased"))
    assert z["biased"] > 20


def test_width_is_a_constant():
    """The gradient is that of the kernels with the width held fixed."""
    source, target = samples()
    x = torch.cat([source, target]).requires_grad_()
    (got,) = torch.autograd.grad(discrepancy(adaptive_kernel(x), 6, "biased"), [x])
    v = float(mean_distance(squared_distances(x)))
    d = (x[:, None] - x[None]).square().sum(-1)
    k = sum(torch.exp(-d / (2 * a * v)) for a in (0.125, 0.25, 0.5, 1.0, 2.0))
    (expected,) = torch.autograd.grad(k[:6, :6].mean() + k[6:, 6:].mean() - 2 * k[:6, 6:].mean(), [x])
    torch.testing.assert_close(got, expected)


def test_distances_far_from_the_origin_keep_their_digits():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))
    expected = (x[:, None] - x[None]).square().sum(-1)
    for found in (squared_distances(x + 1000), squared_distances(x + 1000, x + 1000)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    assert float((squared_distances(x.bfloat16()) - expected).abs().max()) < 0.5


def test_coinciding_samples_are_finite():
    x = torch.ones(6, 4, requires_grad=True)
    value = discrepancy(adaptive_kernel(x), 3, "unbiased")
    (grad,) = torch.autograd.grad(value, [x])
    assert value.isfinite()
    assert grad.isfinite().all()


# ------------------------------------------------------------------------------------- weights and bandwidths


def weighted_mmd_loops(s, t, ws, wt, multiples, b):
    """Squared MMD of weighted means, one pair of samples at a time."""

    def k(x, y):
        square = sum((a - c) ** 2 for a, c in zip(x, y, strict=True))
        return sum(math.exp(-square / (b * m)) for m in multiples)

    ws, wt = [w / sum(ws) for w in ws], [w / sum(wt) for w in wt]
    value = 0.0
    for x, u in ((s, ws), (t, wt)):
        value += sum(u[i] * u[j] * k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)))
    return value - 2 * sum(ws[i] * wt[j] * k(s[i], t[j]) for i in range(len(s)) for j in range(len(t)))


def mean_distance_loops(rows):
    n = len(rows)
    return sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x in rows for y in rows) / (n * n - n)


@pytest.fixture
def domains() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(2)
    kinds = {"dtype": torch.float64, "generator": g}
    return torch.randn(7, 4, **kinds) + 3, 0.5 * torch.randn(5, 4, **kinds) + 3.5


def test_mmd_against_loops(domains):
    s, t = (x.tolist() for x in domains)
    b = mean_distance_loops(s + t)
    five = [0.25, 0.5, 1.0, 2.0, 4.0]
    expected = weighted_mmd_loops(s, t, [1] * 7, [1] * 5, five, b)
    assert multi_kernel_mmd(*domains).item() == pytest.approx(expected, rel=1e-9)
    expected = weighted_mmd_loops(s, t, [1] * 7, [1] * 5, [1.0], 1.68)
    assert multi_kernel_mmd(*domains, kernels=1, bandwidth=1.68).item() == pytest.approx(expected, rel=1e-9)
    expected = weighted_mmd_loops(s, t, [1] * 7, [1] * 5, [1 / 3, 1.0, 3.0], 2.0)
    assert multi_kernel_mmd(*domains, kernels=3, factor=3.0, bandwidth=2.0).item() == pytest.approx(expected)


def test_mmd_of_weighted_pairs(domains):
    """K weighted pairs share the kernel; one with an empty side is zero."""
    s, t = (x.tolist() for x in domains)
    ws = torch.rand(3, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wt = (torch.rand(3, 5, generator=torch.Generator().manual_seed(4)) > 0.4).double()
    ws[2] = 0
    got = multi_kernel_mmd(*domains, source_weight=ws, target_weight=wt)
    five, b = [0.25, 0.5, 1.0, 2.0, 4.0], mean_distance_loops(s + t)
    expected = [weighted_mmd_loops(s, t, ws[i].tolist(), wt[i].tolist(), five, b) for i in range(2)]
    assert got.tolist() == pytest.approx([*expected, 0.0], rel=1e-9, abs=1e-12)
    one = multi_kernel_mmd(*domains, source_weight=ws[0])
    assert one.item() == pytest.approx(weighted_mmd_loops(s, t, ws[0].tolist(), [1] * 5, five, b), rel=1e-9)


def test_mmd_gradient_takes_the_bandwidth_as_constant(domains):
    s, t = domains[0], domains[1].clone().requires_grad_()
    (got,) = torch.autograd.grad(multi_kernel_mmd(s, t), [t])
    b = mean_distance_loops(s.tolist() + t.tolist())
    (expected,) = torch.autograd.grad(multi_kernel_mmd(s, t, bandwidth=b), [t])
    torch.testing.assert_close(got, expected)
    values = []
    for step in (1e-5, -1e-5):
        moved = t.detach().clone()
        moved[1, 2] += step
        values.append(weighted_mmd_loops(s.tolist(), moved.tolist(), [1] * 7, [1] * 5, [0.25, 0.5, 1, 2, 4], b))
    assert got[1, 2].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_mmd_of_equal_samples_is_zero_with_a_finite_gradient():
    x = torch.ones(4, 3, requires_grad=True)
    value = multi_kernel_mmd(x, x.detach())
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ["linear", "circular", "unbiased", "biased"])
def test_mmd_is_the_estimate_from_the_kernel(domains, estimator):
    got = multi_kernel_mmd(*domains, estimator, kernels=3, factor=1.5)
    assert float(got) == pytest.approx(float(discrepancy(adaptive_kernel(torch.cat(domains), 3, 1.5), 7, estimator)))


def test_given_bandwidth_of_other_estimates():
    source, target = samples()
    d = (torch.cat([source, target])[:, None] - torch.cat([source, target])[None]).square().sum(-1)
    kernel = torch.exp(-d / 2.0).numpy()
    for estimator in ("linear", "circular", "unbiased", "biased"):
        got = multi_kernel_mmd(source, target, estimator, kernels=1, bandwidth=2.0)
        assert float(got) == pytest.approx(mmd_loops(kernel, 6, estimator), rel=1e-9)


def test_mistakes_are_named():
    kernel = adaptive_kernel(torch.randn(4, 2))
    with pytest.raises(uda.UDAError, match=r"unknown estimator 'quadratic'.*biased, circular, linear, unbiased"):
        discrepancy(kernel, 2, "quadratic")
    with pytest.raises(uda.UDAError, match="two samples of each domain, got 1 and 3"):
        discrepancy(kernel, 1, "linear")
    with pytest.raises(uda.UDAError, match=r"'circular' of the MMD takes no sample weights"):
        discrepancy(kernel, 2, "circular", source_weight=torch.ones(2))
    with pytest.raises(uda.UDAError, match=r"target_weight has the shape \(3,\)"):
        discrepancy(kernel, 2, "biased", target_weight=torch.ones(3))
