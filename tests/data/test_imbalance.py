"""Classes that keep a share of their samples."""

from __future__ import annotations

import numpy as np
import pytest

from uda.data import Arrays, DataModule
from uda.data.imbalance import class_shares
from uda.errors import UDAError


@pytest.fixture
def reader(tmp_path):
    """Domains a and b: 40 rows of each of five classes; x is the row number."""
    y = np.arange(200) % 5
    x = np.arange(200, dtype=np.float32)[:, None]
    np.savez(tmp_path / "d.npz", a_x=x, a_y=y, b_x=x, b_y=y)
    return Arrays(tmp_path / "d.npz", kind="features")


def data(reader, **options):
    return DataModule(reader, source="a", target="b", **{"source_val_fraction": 0.0, "seed": 0, **options})


def counts(pools):
    return np.bincount(pools.train.labels.numpy(), minlength=5).tolist()


def test_first_half_of_the_target(reader):
    """Of five classes the first two are the first half; the source and the other classes stay whole."""
    task = data(reader, keep={"b": {"first_half": 0.3}}).task
    assert counts(task.target) == [12, 12, 40, 40, 40]
    assert counts(task.sources[0]) == [40] * 5
    assert task.target.eval is task.target.train


def test_names_override_halves_and_rows_round(reader):
    keep = {"b": {"1": 0.51, "first_half": 0.3, "second_half": 0.5, "4": 0.001}, "a": {"0": 0.25}}
    task = data(reader, keep=keep).task
    assert counts(task.target) == [12, 20, 20, 20, 1]
    assert counts(task.sources[0]) == [10, 40, 40, 40, 40]


def test_the_rest_is_undisturbed_and_equal_for_all_seeds(reader):
    one, other = (data(reader, keep={"b": {"0": 0.5}}, seed=s).task.target.train.rows for s in (0, 1))
    assert np.array_equal(one, other)
    assert set(np.flatnonzero(np.arange(200) % 5)) <= set(one.tolist())
    assert sorted(one) == one.tolist()


def test_target_private_classes_can_be_thinned(reader):
    classes = {"known": ["0", "1", "2"], "source_private": ["3"], "target_private": ["4"]}
    task = data(reader, classes=classes, keep={"b": {"4": 0.25, "first_half": 0.5}}).task
    assert counts(task.target) == [20, 20, 40, 0, 10]  # private to the target is id 4, the number of known classes


def test_halves():
    assert class_shares(list("abc"), {"first_half": 0.5}) == {"a": 0.5}
    assert class_shares(list("abc"), {"second_half": 0.5}) == {"b": 0.5, "c": 0.5}


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        ({"b": {"0": 0.0}}, r"share in \(0, 1\]"),
        ({"b": {"first_hlaf": 0.5}}, "first_half"),
        ({"c": {"0": 0.5}}, "no domain of this run"),
        ({"b": 0.3}, "mapping"),
    ],
)
def test_mistakes(reader, keep, text):
    with pytest.raises(UDAError, match=text):
        _ = data(reader, keep=keep).task


def test_an_unlabelled_domain_cannot_be_thinned(reader, tmp_path):
    arrays = dict(np.load(tmp_path / "d.npz"))
    del arrays["b_y"]
    np.savez(tmp_path / "u.npz", **arrays)
    with pytest.raises(UDAError, match="no labels"):
        _ = data(Arrays(tmp_path / "u.npz", kind="features"), keep={"b": {"0": 0.5}}).task
