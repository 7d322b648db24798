"""Domains of several readers in one run."""

from __future__ import annotations

import numpy as np
import pytest

import uda
from uda.data import Arrays, DataModule, Digits, Several
from uda.data.tensor_views import TensorViews
from uda.described import describe


@pytest.fixture
def arrays(tmp_path):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 255, (40, 12, 12, 3)).astype("uint8")
    np.savez(tmp_path / "d.npz", colour_x=x, colour_y=np.arange(40) % 10)
    return Arrays(str(tmp_path / "d.npz"))


def test_domains_of_two_readers_are_one_run(arrays):
    reader = Several([arrays, Digits(n_rendered=40)])
    assert reader.domains() == ["colour", "rendered", "handwritten"]
    assert (reader.read("colour").labels == arrays.read("colour").labels).all()
    views = TensorViews(size=8, channels=3)
    data = DataModule(reader, source=["colour", "rendered"], target="handwritten", views=views, batch_size=4)
    data.setup("fit")
    assert data.input_shape == (3, 8, 8)
    assert data.class_names == [str(d) for d in range(10)]
    described = describe(reader)["init_args"]["readers"]
    assert [r["class_path"].rpartition(".")[2] for r in described] == ["Arrays", "Digits"]


def test_bad_readers_are_refused(arrays):
    with pytest.raises(uda.UDAError, match="one reader or more"):
        Several([])
    with pytest.raises(uda.UDAError, match="both have a domain 'rendered'"):
        Several([Digits(), arrays, Digits()]).domains()
    with pytest.raises(uda.UDAError, match=r"unknown domain 'renderd'.*'rendered'"):
        Several([arrays, Digits()]).read("renderd")


def test_sources_of_other_classes_are_refused_or_joined(tmp_path):
    """One of two sources lacks classes: refused by name, and joined where that is asked for."""
    np.savez(tmp_path / "few.npz", few_x=np.zeros((20, 8, 8), "uint8"), few_y=np.arange(20) % 4)
    reader = Several([Arrays(str(tmp_path / "few.npz")), Digits(n_rendered=40)])

    def classes(**options):
        data = DataModule(reader, source=["few", "rendered"], target="handwritten", batch_size=4, **options)
        data.setup("fit")
        assert data.missing_classes == data.spec["missing_classes"] == {"few": [4, 5, 6, 7, 8, 9]}
        return data.class_names

    with pytest.raises(uda.UDAError, match="class '4' is missing in domain 'few'"):
        classes()
    assert classes(allow_missing_classes=True) == [str(d) for d in range(10)]
    assert classes(classes={"known": [str(d) for d in range(10)]})[4:] == list("456789")
    with pytest.raises(uda.UDAError, match=r"'gone' in Several \(no key 'gone_x' in '.*few.npz'\)"):
        DataModule(reader, source=["few", "gone"], target="handwritten").setup("fit")


def test_a_source_whose_file_has_gone_is_named(tmp_path):
    """One file a domain: the message names the file, before anything is read."""
    x, y = np.zeros((20, 8, 8), "uint8"), np.arange(20) % 4
    for name in "abt":
        np.savez(tmp_path / f"{name}.npz", **{f"{name}_x": x, f"{name}_y": y})
    data = lambda: DataModule(Arrays(str(tmp_path / "{domain}.npz")), ["a", "b"], "t", batch_size=4)  # noqa: E731
    data().setup("fit")
    assert "missing_classes" not in data().spec
    (tmp_path / "b.npz").unlink()
    with pytest.raises(uda.UDAError, match=r"unknown source domain 'b' in Arrays \(no file '.*b.npz'\)"):
        data().setup("fit")
