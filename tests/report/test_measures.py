"""Numbers behind the figures, against naive loops and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

import uda
from uda.report import measures as m


def test_ece_by_hand() -> None:
    # two bins of width 1/2: {0.4 wrong, 0.5 right} and {0.8 right, 0.9 right, 1.0 wrong}
    r = m.reliability(np.array([0.4, 0.5, 0.8, 0.9, 1.0]), np.array([0, 1, 1, 1, 0]), bins=2)
    assert r.count.tolist() == [2, 3]
    assert r.confidence.tolist() == pytest.approx([0.45, 0.9])
    assert r.accuracy.tolist() == pytest.approx([0.5, 2 / 3])
    assert r.ece == pytest.approx(2 / 5 * 0.05 + 3 / 5 * (0.9 - 2 / 3))


def test_ece_against_a_loop_and_the_one_before_training() -> None:
    from uda.shift.calibration import ece

    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(5, 0.4), 400)
    y = rng.integers(0, 5, 400)
    confidence, correct = probs.max(1), probs.argmax(1) == y
    total = 0.0
    for b in range(15):
        rows = [i for i in range(400) if b / 15 < confidence[i] <= (b + 1) / 15]
        if rows:
            total += len(rows) / 400 * abs(correct[rows].mean() - confidence[rows].mean())
    found = m.reliability(confidence, correct)
    assert found.ece == pytest.approx(total)
    assert found.ece == pytest.approx(ece(probs, y))
    assert np.isnan(found.accuracy[found.count == 0]).all()
    with pytest.raises(uda.UDAError, match="at least one"):
        m.reliability(np.zeros(0), np.zeros(0))


def test_confusion_by_hand_with_unknown_and_unlabelled_rows() -> None:
    y = np.array([0, 0, 1, 1, 1, 2, -1])
    label = np.array([0, 1, 1, 1, 2, 2, 0])
    found = m.confusion_matrix(label, y, 3)
    assert found.tolist() == [[1, 1, 0], [0, 2, 1], [0, 0, 1]]
    assert m.class_accuracies(found).tolist() == pytest.approx([1 / 2, 2 / 3, 1.0])
    assert m.confused_pairs(found, 5) == [(0, 1, 1, 0.5), (1, 2, 1, pytest.approx(1 / 3))]
    assert math.isnan(m.class_accuracies(np.zeros((2, 2), int))[0])


def test_worst_mistakes_are_confident_wrong_and_not_all_of_one_pair() -> None:
    y = np.array([0, 0, 0, 1, -1, 2])
    label = np.array([1, 1, 1, 1, 0, 0])
    score = np.array([0.7, 0.9, 0.8, 1.0, 1.0, 0.6])
    assert m.worst_mistakes(score, label, y, 9).tolist() == [1, 2, 0, 5]
    assert m.worst_mistakes(score, label, y, 9, per_pair=2).tolist() == [1, 2, 5]
    assert m.worst_mistakes(score, label, y, 1).tolist() == [1]


def test_samples_and_planes_are_a_function_of_the_seed() -> None:
    rows = m.subsample(50, 10, seed=1)
    assert len(set(rows.tolist())) == 10
    assert (np.diff(rows) > 0).all()
    assert (rows == m.subsample(50, 10, seed=1)).all()
    assert (rows != m.subsample(50, 10, seed=2)).any()
    assert m.subsample(7, 0).tolist() == m.subsample(7, 9).tolist() == list(range(7))
    x = np.random.default_rng(0).normal(size=(40, 6))
    x[:20] += 9
    for how in ("tsne", "pca"):
        xy = m.embed(x, how)
        assert xy.shape == (40, 2)
        assert np.allclose(xy, m.embed(x, how))
        assert (
            np.linalg.norm(xy[:20].mean(0) - xy[20:].mean(0)) > np.linalg.norm(xy[:20] - xy[:20].mean(0), axis=1).mean()
        )
    assert m.embed(np.arange(6.0)[:, None]).shape == (6, 2)  # a single feature


def test_mixing_of_one_cloud_and_of_two() -> None:
    rng = np.random.default_rng(0)
    x, is_target = rng.normal(size=(600, 3)), np.arange(600) % 3 == 0
    assert m.mixing(x, is_target) == pytest.approx(1, abs=0.1)
    assert m.mixing(x + 99 * is_target[:, None], is_target) == 0


def test_settings_that_differ() -> None:
    align = {"class_path": "DANN", "init_args": {"weight": 1.0}}
    one = {"model": {"plugins": {"align": align}, "bottleneck": 8}, "seed_everything": 0}
    two = {"model": {"plugins": None, "bottleneck": 8}, "seed_everything": 1}
    assert m.differences([one, two]) == {
        "model.plugins.align.class_path": ["DANN", ...], "model.plugins.align.weight": [1.0, ...],
        "seed_everything": [0, 1],
    }  # fmt: skip
    assert m.differences([one, one]) == {}


def test_umap_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(uda.UDAError, match="pip install umap-learn"):
        m.check_embedding("umap")
