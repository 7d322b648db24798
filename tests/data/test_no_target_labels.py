"""Shuffling the target's labels on disk changes no training batch, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from uda.data import Arrays, DataModule, Datasets, ImageFolders, ImageLists, ImageViews
from uda.plugin import DataNeeds

NEEDS = DataNeeds(
    held_out=True, views=frozenset({"weak", "strong"}), source_views=frozenset({"weak"}), class_balanced=True
)
VIEWS = ImageViews(8, 10)


@pytest.fixture
def train(trainer, recorder):
    def go(reader, source, target, **kwargs):
        model = recorder(NEEDS)
        kwargs = {"batch_size": 4, "epoch_steps": 6, "target_test_fraction": 0.2, "seed": 1, **kwargs}
        data = DataModule(reader, source, target, **kwargs)
        trainer(max_epochs=2, limit_val_batches=0).fit(model, data)
        return model.seen, data

    return go


def test_folders(train, same, folders):
    before, _ = train(ImageFolders(folders), "photo", "sketch", views=VIEWS)
    files = sorted((folders / "sketch").rglob("*.png"))
    classes = [f.parent.name for f in files]
    random.Random(0).shuffle(classes)
    assert len({*classes}) == 3
    for i, (file, name) in enumerate(zip(files, classes, strict=True)):
        file.rename(folders / "sketch" / name / f"moved{99 - i}.png")
    after, _ = train(ImageFolders(folders), "photo", "sketch", views=VIEWS)
    assert same(before, after)


def test_folders_without_class_folders(train, same, folders):
    before, labelled = train(ImageFolders(folders), "photo", "sketch", views=VIEWS)
    for i, file in enumerate(sorted((folders / "sketch").rglob("*.png"))):
        file.rename(folders / "sketch" / f"{i:03d}.png")
    for empty in ("cat", "dog", "fox"):
        (folders / "sketch" / empty).rmdir()
    after, unlabelled = train(ImageFolders(folders), "photo", "sketch", views=VIEWS)
    assert same(before, after)
    assert labelled.class_names == unlabelled.class_names
    assert all((b["y"] == -1).all() for b in unlabelled.val_dataloader()[1])


def test_folders_of_equal_sizes_are_ordered_by_content(tmp_path):
    contents = [bytes([i]) * 100_000 for i in range(5)]
    contents.append(contents[0][:90_000] + b"x" * 10_000)  # the middle is equal, the end is not
    orders = []
    for turn in range(2):
        paths = []
        for i, content in enumerate(contents if turn == 0 else reversed(contents)):
            path = tmp_path / f"{turn}{i}.jpg"
            path.write_bytes(content)
            paths.append(str(path))
        from uda.data import FileInputs

        order = FileInputs(paths, by_content=True).order()
        orders.append([(tmp_path / paths[i]).read_bytes() for i in order])
    assert orders[0] == orders[1]


def test_arrays(train, same, npz, tmp_path):
    before, _ = train(Arrays(npz), "a", "b")
    arrays = dict(np.load(npz))
    arrays["b_y"] = np.random.default_rng(3).permutation(arrays["b_y"])
    other = tmp_path / "shuffled.npz"
    np.savez(other, **arrays)
    after, _ = train(Arrays(other), "a", "b")
    assert same(before, after)
    del arrays["b_y"]
    np.savez(other, **arrays)
    without, data = train(Arrays(other), "a", "b")
    assert same(before, without)
    assert data.num_classes == 4


def test_lists(train, same, folders):
    def write(domain, shuffle):
        files = sorted((folders / domain).rglob("*.png"))
        labels = [("cat", "dog", "fox").index(f.parent.name) for f in files]
        if shuffle:
            random.Random(0).shuffle(labels)
        lines = [f"{f.relative_to(folders)} {y}" for f, y in zip(files, labels, strict=True)]
        (folders / f"{domain}.txt").write_text("\n".join(lines))

    reader = ImageLists(folders, {"photo": "photo.txt", "sketch": "sketch.txt"}, ["cat", "dog", "fox"])
    write("photo", False)
    write("sketch", False)
    before, _ = train(reader, "photo", "sketch", views=VIEWS)
    write("sketch", True)
    after, _ = train(reader, "photo", "sketch", views=VIEWS)
    assert same(before, after)


def test_target_training_objects_hold_no_label(npz):
    data = DataModule(Arrays(npz), "a", "b", batch_size=4)
    loaders = data.train_dataloader().iterables
    assert "y" in next(iter(loaders["sources"]["a"]))
    assert loaders["target"].dataset.labels is None
    assert data.pool_dataloader("b").dataset.labels is None
    assert set(next(iter(loaders["target"]))) == {"x", "index"}
    assert set(next(iter(data.pool_dataloader("b")))) == {"x", "index"}
    assert set(next(iter(data.pool_dataloader("a")))) == {"x", "index", "y"}


def test_a_torch_dataset_as_target_gives_no_label():
    import torch
    from torch.utils.data import TensorDataset

    x, y = torch.rand(20, 3), torch.arange(20) % 2
    data = DataModule.from_datasets(TensorDataset(x, y), TensorDataset(x + 1, y), batch_size=4)
    batch = next(iter(data.train_dataloader()))[0]
    assert set(batch["target"]) == {"x", "index"}
    assert set(batch["sources"]["source"]) == {"x", "index", "y"}
    assert Datasets(target=x).read("target").labels is None


def test_samples_that_a_method_picks_carry_no_label(folders):
    data = DataModule(ImageFolders(folders), "photo", "sketch", target_test_fraction=0.2, seed=1, views=VIEWS)
    names = data.pool_ids("sketch")
    batch = data.samples("sketch", np.array([2, 0]), seed=3, view="test")
    assert set(batch) == {"x", "index"}
    assert batch["index"].tolist() == [2, 0]
    pool = {int(i): x for b in data.pool_dataloader("sketch") for i, x in zip(b["index"], b["x"], strict=True)}
    assert len(names) == len(pool)
    assert all(torch.equal(batch["x"][k], pool[i]) for k, i in enumerate((2, 0)))
    assert set(names).isdisjoint(set(data.ids("sketch")))  # those of the evaluation
