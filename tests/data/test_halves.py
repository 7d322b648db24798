"""A domain in two."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import uda
from uda.data import Arrays, DataModule, Halves, ImageFolders
from uda.described import describe


@pytest.fixture
def one(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3)).astype("uint8")
    np.savez(tmp_path / "photos.npz", x=x, y=np.arange(40) % 4)
    return Arrays(str(tmp_path / "{domain}.npz"), x_key="x", y_key="y")


def test_halves_share_no_row_and_miss_none(one):
    reader, whole = Halves(one, share=0.7), one.read("photos")
    assert reader.domains() == ["photos_train", "photos_test"]
    train, test = (reader.read(d) for d in reader.domains())
    assert (len(train), len(test)) == (28, 12)
    rows = [int(i.rpartition("/")[2]) for part in (train, test) for i in part.ids]
    assert sorted(rows) == list(range(40))
    x = torch.cat([part.inputs.fetch(torch.arange(len(part))) for part in (train, test)])
    assert torch.equal(x, whole.inputs.fetch(torch.tensor(rows)))
    assert torch.equal(torch.cat([train.labels, test.labels]), whole.labels[rows])
    assert Halves(one, share=0.7).read("photos_test").ids == test.ids
    assert Halves(one, share=0.7, seed=1).read("photos_test").ids != test.ids
    data = DataModule(reader, "photos_train", "photos_test", batch_size=4)
    data.setup("fit")
    assert data.input_shape == (3, 8, 8)
    assert describe(reader)["init_args"]["reader"]["class_path"].endswith("Arrays")


def test_labels_do_not_draw(folders):
    """Files moved among the folders of classes stay in their halves, in the same order."""
    reader = Halves(ImageFolders(folders))

    def contents(half):
        inputs = reader.read(f"photo_{half}").inputs
        return [np.asarray(inputs.load(i)).tobytes() for i in inputs.order()]

    before = contents("train"), contents("test")
    assert not set(before[0]) & set(before[1])
    for name in ("0.png", "1.png"):
        shutil.move(folders / "photo" / "cat" / name, folders / "photo" / "fox" / f"moved{name}")
    assert (contents("train"), contents("test")) == before


def test_an_order_by_content_survives_in_both(one):
    whole = one.read("photos").inputs
    whole.order = lambda: np.arange(40)[::-1]
    assert whole.take(np.array([3, 30, 8])).order().tolist() == [1, 2, 0]


def test_what_cannot_be_halved_is_refused(one, tmp_path):
    for share in (0, 1, 1.5):
        with pytest.raises(uda.UDAError, match="between 0 and 1"):
            Halves(one, share)
    with pytest.raises(uda.UDAError, match="photos_train"):
        Halves(one).read("photos_trian")
    np.savez(tmp_path / "photos.npz", x=np.zeros((1, 8, 8), "uint8"), y=[0])
    with pytest.raises(uda.UDAError, match="single row"):
        Halves(one).read("photos_test")
