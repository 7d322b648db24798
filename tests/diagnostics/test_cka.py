"""Similarities of representations against their definitions, written a second time in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import uda
from uda.diagnostics import cka, covariance_similarity, dcka, deconfound, explained_by, gram, hsic, kernel_similarity


def data(seed: int, n: int = 12, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width))


def t(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x)


def naive_gram(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(0)
    x = x / np.linalg.norm(x)
    return np.array([[a @ b for b in x] for a in x])


def naive_unbiased(k: np.ndarray, m: np.ndarray) -> float:
    """Song et al. 2012 as a sum over tuples of distinct samples, without a factor."""
    n = len(k)
    pairs = np.mean([k[i, j] * m[i, j] for i, j in itertools.permutations(range(n), 2)])
    quads = np.mean([k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(range(n), 4)])
    triples = np.mean([k[i, j] * m[i, q] for i, j, q in itertools.permutations(range(n), 3)])
    return pairs + quads - 2 * triples


def naive_residual(k: np.ndarray, c: np.ndarray) -> np.ndarray:
    design = np.stack([np.ones(k.size), c.ravel()], 1)
    beta = np.linalg.inv(design.T @ design) @ design.T @ k.ravel()
    return (k.ravel() - design @ beta).reshape(k.shape)


def naive_similarity(k: np.ndarray, m: np.ndarray) -> float:
    h = np.eye(len(k)) - 1 / len(k)
    k, m = h @ k @ h, h @ m @ h
    return float((k * m).sum() / np.linalg.norm(k) / np.linalg.norm(m))


def test_cka_against_feature_covariances():
    """Kornblith et al. 2019: linear CKA is ``|Y'X|^2 / (|X'X| |Y'Y|)`` of centred activations."""
    x, y = data(0), data(1, width=3)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(b.T @ a) ** 2 / np.linalg.norm(a.T @ a) / np.linalg.norm(b.T @ b)
    assert float(cka(t(x), t(y))) == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(gram(t(x)).numpy(), naive_gram(x), atol=1e-12)


def test_unbiased_hsic_against_sums_over_distinct_samples():
    x, y = naive_gram(data(2, n=7)), naive_gram(data(3, n=7))
    factor = 7 * (7 - 3)  # the estimator's 1 / (n (n - 3)) cancels in CKA
    assert float(hsic(t(x), t(y), unbiased=True)) / factor == pytest.approx(naive_unbiased(x, y), rel=1e-9)
    expected = naive_unbiased(x, y) / np.sqrt(naive_unbiased(x, x) * naive_unbiased(y, y))
    assert float(kernel_similarity(t(x), t(y), unbiased=True)) == pytest.approx(expected, rel=1e-9)


def test_dcka_against_least_squares_on_all_entries():
    x, y, u = data(4), data(5, width=3), data(6, width=8)
    k, m, c = (naive_gram(v) for v in (x, y, u))
    np.testing.assert_allclose(deconfound(t(k), t(c)).numpy(), naive_residual(k, c), atol=1e-12)
    expected = naive_similarity(naive_residual(k, c), naive_residual(m, c))
    assert float(dcka(t(x), t(y), t(u))) == pytest.approx(expected, rel=1e-9)


def test_negative_eigenvalues_can_be_left_out():
    k, c = naive_gram(data(4)), naive_gram(data(6, width=8))
    rest = naive_residual(k, c)
    values, vectors = np.linalg.eigh(rest)
    assert values.min() < -1e-6
    expected = sum(v * np.outer(e, e) for v, e in zip(values, vectors.T, strict=True) if v > 0)
    np.testing.assert_allclose(deconfound(t(k), t(c), positive=True).numpy(), expected, atol=1e-10)


def test_what_cka_does_not_see():
    x = data(7)
    turn, _ = np.linalg.qr(data(8, n=5))
    for unbiased in (False, True):
        assert float(cka(t(x), t(3 * x @ turn + 2), unbiased)) == pytest.approx(1.0)
    assert float(cka(t(x), t(x * np.array([9, 1, 1, 1, 1])))) < 0.99


def test_unbiased_cka_of_unrelated_wide_features_is_near_zero():
    x, y = data(0, n=40, width=400), data(1, n=40, width=400)
    assert float(cka(t(x), t(y))) > 0.8
    assert abs(float(cka(t(x), t(y), unbiased=True))) < 0.1


def test_the_inputs_are_taken_out():
    """Two representations that share nothing but the inputs look alike to CKA, and unlike to dCKA."""
    inputs = data(0, n=120, width=6)
    x, y = (np.concatenate([2 * inputs, data(s, n=120, width=6)], 1) for s in (1, 2))
    assert float(cka(t(x), t(y), unbiased=True)) > 0.8
    assert abs(float(dcka(t(x), t(y), t(inputs), unbiased=True))) < 0.2
    shared = data(3, n=120, width=6)  # what both have learnt stays
    x, y = (np.concatenate([v, 2 * shared], 1) for v in (x, y))
    assert float(dcka(t(x), t(y), t(inputs), unbiased=True)) > 0.8


def test_share_explained_by_the_inputs():
    x, u = data(1, n=30), data(2, n=30)
    k, c = naive_gram(x), naive_gram(u)
    expected = np.corrcoef(k.ravel(), c.ravel())[0, 1] ** 2
    assert float(explained_by(t(x), t(u))) == pytest.approx(expected, rel=1e-9)
    assert float(explained_by(t(3 * u), t(u))) == pytest.approx(1.0)


def test_covariance_similarity_against_numpy():
    x, y = data(1, n=9), data(2, n=14)
    a, b = np.cov(x.T), np.cov(y.T)
    expected = (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
    assert float(covariance_similarity(t(x), t(y))) == pytest.approx(expected, rel=1e-10)
    assert float(covariance_similarity(t(x), t(-4 * x + 1))) == pytest.approx(1.0)
    one, other = x * np.array([1, 1, 0, 0, 0]), x * np.array([0, 0, 1, 1, 1])
    assert float(covariance_similarity(t(one), t(other))) == pytest.approx(0.0, abs=1e-12)


def test_images_half_precision_and_constants():
    x = torch.rand(10, 3, 4, 4)
    assert float(cka(x, x.flatten(1))) == pytest.approx(1.0)
    assert float(cka(x.half(), x)) == pytest.approx(1.0, abs=1e-3)
    assert torch.isnan(cka(torch.ones(10, 3), x))  # a dead layer is like nothing
    constant = torch.ones(10, 3)
    assert float(dcka(x, x, constant)) == pytest.approx(1.0)  # and explains nothing
    assert torch.isnan(dcka(2 * x + 1, torch.rand(10, 3), x))  # of the inputs themselves nothing is left


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: cka(torch.rand(5, 2), torch.rand(6, 2)), "the same samples"),
        (lambda: cka(torch.rand(3, 2), torch.rand(3, 2), unbiased=True), "at least 4"),
        (lambda: gram(torch.rand(1, 2)), "at least 2"),
        (lambda: gram(torch.tensor([[0.0], [torch.nan]])), "NaN"),
        (lambda: dcka(torch.rand(5, 2), torch.rand(5, 2), torch.rand(4, 2)), "confounder"),
        (lambda: covariance_similarity(torch.rand(5, 2), torch.rand(5, 3)), "same features"),
    ],
)
def test_errors(call, text):
    with pytest.raises(uda.UDAError, match=text):
        call()
