"""An unreadable image stops the run with its name, or is replaced and counted."""

from __future__ import annotations

import functools
import operator
import warnings

import pytest

from uda.data import BadImage, DataModule, ImageFolders, ImageViews


def module(folders, policy, **kwargs):
    kwargs = {"batch_size": 4, "views": ImageViews(8, 10), "source_val_fraction": 0, "seed": 0, **kwargs}
    return DataModule(ImageFolders(folders), "photo", "sketch", on_bad_image=policy, **kwargs)


@pytest.fixture
def broken(folders):
    good = (folders / "photo" / "cat" / "1.png").read_bytes()
    (folders / "photo" / "cat" / "0.png").write_bytes(good[: len(good) // 2])
    (folders / "sketch" / "fox" / "2.png").write_bytes(b"")
    return folders


@pytest.mark.parametrize("workers", [0, 2])
def test_stop_names_the_file(broken, workers):
    loader = module(broken, "stop", num_workers=workers).val_dataloader()[0]
    with pytest.raises(BadImage, match=r"cannot read image .*photo/cat/0.png"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_skip_replaces_and_reports_at_the_end_of_an_epoch(broken, workers, trainer, recorder, same):
    def run(**kwargs):
        data = module(broken, "skip", **kwargs)
        model = recorder()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
        return data, model.seen, [str(w.message) for w in caught if "unreadable" in str(w.message)]

    data, seen, messages = run(num_workers=workers)
    photo = [m for m in messages if "domain 'photo': 1 unreadable" in m]
    assert len(photo) == 2
    assert "photo/cat/0.png" in photo[0]
    position = data.task["photo"].train.rows.tolist().index(0)
    for batch in seen:
        source = batch["sources/photo"]
        assert "bad" not in source
        assert position not in source["index"]
        assert source["y"].tolist() == data.task["photo"].train.labels[source["index"]].tolist()
    assert same(seen, run()[1])


def test_evaluation_keeps_the_index_and_drops_the_label(broken):
    data = module(broken, "skip")
    with pytest.warns(UserWarning, match="domain 'sketch': 1 unreadable"):
        rows = list(data.val_dataloader()[1])
    index, y = (functools.reduce(operator.iadd, (b[k].tolist() for b in rows), []) for k in ("index", "y"))
    assert index == list(range(15))
    assert [data.ids("sketch")[i].endswith("fox/2.png") for i in index] == [v == -1 for v in y]


def test_no_readable_image_at_all(folders):
    for file in (folders / "photo").rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(BadImage, match="none of the 15 images can be read"):
        module(folders, "skip").setup("fit")
