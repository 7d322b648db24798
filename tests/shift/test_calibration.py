"""Calibration and accuracy estimates against plain loops."""

from __future__ import annotations

import numpy as np
import pytest

from uda import UDAError
from uda.shift.calibration import atc, bcts, doc, ece, softmax, temperature


@pytest.fixture(scope="module")
def rows():
    """Logits whose right temperature is 2: labels are drawn from softmax(logits / 2)."""
    rng = np.random.default_rng(0)
    logits = 4 * rng.normal(size=(4000, 5))
    p = softmax(logits / 2)
    y = np.array([rng.choice(5, p=row) for row in p])
    return logits, y


@pytest.mark.parametrize("bins", [5, 15])
def test_ece_by_loops(rows, bins):
    logits, y = rows
    probs = softmax(logits)[:700]
    total = 0.0
    for b in range(bins):
        members = [i for i in range(700) if b / bins < max(probs[i]) <= (b + 1) / bins]
        if members:
            accuracy = sum(int(np.argmax(probs[i])) == y[i] for i in members) / len(members)
            confidence = sum(max(probs[i]) for i in members) / len(members)
            total += len(members) / 700 * abs(accuracy - confidence)
    assert ece(probs, y[:700], bins) == pytest.approx(total, abs=1e-12)


def test_ece_at_the_edges():
    assert ece(np.array([[1.0, 0.0], [0.0, 1.0]]), [0, 1]) == 0.0
    assert ece(np.array([[1.0, 0.0]]), [1]) == 1.0


def test_temperature_is_found_and_mends_the_calibration(rows):
    logits, y = rows
    found = temperature(logits, y)
    assert found == pytest.approx(2.0, abs=0.1)
    # a plain grid has its smallest loss beside it
    grid = np.linspace(1, 4, 301)
    losses = [-np.log(softmax(logits / t)[np.arange(len(y)), y]).mean() for t in grid]
    assert found == pytest.approx(grid[int(np.argmin(losses))], abs=0.02)
    assert ece(softmax(logits / found), y) < 0.5 * ece(softmax(logits), y)


def test_bcts_makes_the_mean_of_each_class_right(rows):
    logits, y = rows
    scale, bias = bcts(logits + np.array([2.0, 0, 0, -2.0, 0]), y)
    assert scale == pytest.approx(2.0, abs=0.15)
    np.testing.assert_allclose(bias, [-1, 0, 0, 1, 0], atol=0.2)
    probs = softmax((logits + np.array([2.0, 0, 0, -2.0, 0])) / scale + bias)
    # the stationary point of the bias: mean probability of a class is its share of the labels
    np.testing.assert_allclose(probs.mean(0), np.bincount(y, minlength=5) / len(y), atol=1e-3)


def test_a_classifier_without_errors_has_a_finite_temperature():
    scale, bias = bcts(np.array([[3.0, 0.0], [0.0, 3.0]]), [0, 1])
    assert np.isfinite(scale)
    assert scale > 0
    assert np.isfinite(bias).all()


def test_atc_and_doc_by_loops(rows):
    logits, y = rows
    probs = softmax(logits)
    source, target, y = probs[:1000], probs[1000:1800], y[:1000]
    errors = sum(int(np.argmax(p)) != label for p, label in zip(source, y, strict=True))
    threshold = sorted(max(p) for p in source)[errors]  # as many are below it as are wrong
    above = sum(max(p) >= threshold for p in target) / 800
    assert atc(source, y, target) == pytest.approx(above)
    fall = sum(max(p) for p in source) / 1000 - sum(max(p) for p in target) / 800
    assert doc(source, y, target) == pytest.approx(1 - errors / 1000 - fall)
    assert atc(source, y, source) == pytest.approx(1 - errors / 1000)
    assert doc(source, y, source) == pytest.approx(1 - errors / 1000)


def test_estimates_follow_the_true_accuracy(rows):
    logits, y = rows
    even = softmax(logits / 2)
    hard = softmax(logits / 6)  # calibrated rows that are harder
    rng = np.random.default_rng(1)
    hard_y = np.array([rng.choice(5, p=p) for p in hard])
    true = (hard.argmax(1) == hard_y).mean()
    assert doc(even, y, hard) == pytest.approx(true, abs=0.03)
    assert atc(even, y, hard) < atc(even, y, even)


def test_bad_input_is_named():
    with pytest.raises(UDAError, match=r"labels \[N\] in \[0, C\)"):
        ece(np.ones((3, 2)) / 2, [0, 1, 2])
