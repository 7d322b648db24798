from __future__ import annotations

import numpy as np
import pytest
import torch

from uda.data import Arrays, DataModule, Generated, ImageFolders, ImageViews, valid_rows
from uda.errors import UDAError


class FakeTrainer:
    """A place in a group of processes, as the data module sees it."""

    lightning_module = None

    def __init__(self, rank, world):
        self.global_rank, self.world_size = rank, world


def collect(loader):
    batches = list(loader)
    assert len(batches) == len(loader)
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def test_loaders_follow_the_domains():
    data = DataModule(Generated(targets=2), ["source", "target2"], "target", batch_size=8)
    assert data.eval_domains("val") == data.eval_domains("test") == ["source", "target2", "target"]
    assert data.eval_is_target("val") == [False, False, True]
    assert data.eval_domains("predict") == ["target"]
    assert data.eval_is_target("predict") == [True]
    assert [x.name for x in data.val_dataloader()] == data.eval_domains("val")
    assert [x.name for x in data.predict_dataloader()] == ["target"]


def test_each_row_once_in_order():
    data = DataModule(Generated(n=50), "source", "target", eval_batch_size=16, seed=0)
    for name, loader in zip(data.eval_domains(), data.val_dataloader(), strict=True):
        rows = collect(loader)
        assert torch.equal(rows["index"], torch.arange(len(data.ids(name))))
    assert len(data.ids("source")) == 5
    assert len(data.ids("target")) == 50
    assert data.sizes == {"source": 45, "target": 50}


def test_source_splits_do_not_overlap():
    data = DataModule(Generated(n=50), "source", "target", seed=0)
    pools = data.task["source"]
    assert not set(pools.train.rows) & set(pools.eval.rows)
    assert len(pools.train) + len(pools.eval) == 50
    data = DataModule(Generated(n=50), "source", "target", source_val_fraction=0)
    assert data.pool_is_eval("source")
    assert data.sizes["source"] == 50


def test_transductive_and_inductive_target():
    data = DataModule(Generated(n=50), "source", "target", seed=0)
    assert data.pool_is_eval("target")
    assert not data.pool_is_eval("source")
    pool, val = collect(data.pool_dataloader("target")), collect(data.val_dataloader()[1])
    assert torch.equal(pool["x"], val["x"])
    assert torch.equal(pool["index"], val["index"])
    data = DataModule(Generated(n=50), "source", "target", target_test_fraction=0.2, seed=0)
    assert not data.pool_is_eval("target")
    assert data.sizes["target"] == 40
    assert len(data.ids("target")) == 10
    pools = data.task["target"]
    assert not set(pools.train.rows) & set(pools.eval.rows)


def test_pool_is_the_training_pool_by_index():
    data = DataModule(Generated(n=50), "source", "target", batch_size=8, seed=0)
    pool = collect(data.pool_dataloader("source"))
    batch = next(iter(data.train_dataloader()))[0]["sources"]["source"]
    assert torch.equal(pool["x"][batch["index"]], batch["x"])
    assert torch.equal(pool["y"][batch["index"]], batch["y"])


@pytest.mark.parametrize("n", [2, 5, 8, 13])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_count_each_row_once(n, world):
    kept, lengths = [], set()
    for rank in range(world):
        data = DataModule(Generated(n=n), "source", "target", eval_batch_size=2, source_val_fraction=0)
        data.trainer = FakeTrainer(rank, world)
        data.pin_memory = False
        loader = data.val_dataloader()[1]
        lengths.add(len(loader))
        index = collect(loader)["index"]
        kept += index[valid_rows(index, rank, world)].tolist()
        assert len(data.pool_dataloader("target")) == len(loader)
    assert sorted(kept) == list(range(n))
    assert len(lengths) == 1


def test_ranks_train_on_disjoint_slices_of_one_stream():
    def indices(rank, world, batch):
        data = DataModule(
            Generated(n=64), "source", "target", batch_size=batch, epoch_steps=6, pin_memory=False
        )
        data.trainer = FakeTrainer(rank, world)
        data._batches_done = lambda: 0
        return torch.stack([b[0]["target"]["index"] for b in data.train_dataloader()])

    both = torch.cat([indices(0, 2, 4), indices(1, 2, 4)], dim=1)
    assert torch.equal(both, indices(0, 1, 8))


def test_ids_are_by_name_and_equal_over_domains(folders):
    reader = ImageFolders(folders)
    data = DataModule(reader, "photo", "sketch", views=ImageViews(8, 10))
    assert data.class_names == ["cat", "dog", "fox"]
    for name, loader in zip(data.eval_domains(), data.val_dataloader(), strict=True):
        y = collect(loader)["y"]
        assert [data.class_names[c] for c in y] == [i.split("/")[-2] for i in data.ids(name)]


def test_open_set_classes(folders):
    split = {"known": ["fox", "dog"], "target_private": ["cat"]}
    data = DataModule(ImageFolders(folders), "photo", "sketch", classes=split, views=ImageViews(8, 10))
    assert data.class_names == ["fox", "dog"]
    assert data.num_classes == 2
    assert data.sizes == {"photo": 9 - 1, "sketch": 15}
    source, target = (collect(loader) for loader in data.val_dataloader())
    assert set(source["y"].tolist()) <= {0, 1}
    for y, path in zip(target["y"].tolist(), data.ids("sketch"), strict=True):
        assert y == {"fox": 0, "dog": 1, "cat": 2}[path.split("/")[-2]]
    assert set(collect(data.pool_dataloader("photo"))["y"].tolist()) == {0, 1}


def test_partial_classes_drop_other_target_images(folders):
    split = {"known": ["dog"], "source_private": ["cat", "fox"]}
    data = DataModule(ImageFolders(folders), "photo", "sketch", classes=split, views=ImageViews(8, 10))
    assert data.class_names == ["dog", "cat", "fox"]
    assert data.sizes["sketch"] == 5
    assert set(collect(data.val_dataloader()[1])["y"].tolist()) == {0}


def test_unlabelled_target_is_minus_one(npz):
    data = DataModule(Arrays(npz), ["a", "b"], "c")
    assert (collect(data.val_dataloader()[2])["y"] == -1).all()
    assert data.ids("c")[:2] == ["c/0", "c/1"]


def test_spec_is_plain(npz):
    import json

    data = DataModule(Arrays(npz), ["a"], "c")
    assert json.loads(json.dumps(data.spec)) == {
        "num_classes": 4,
        "class_names": ["0", "1", "2", "3"],
        "input_shape": [3, 8, 8],
        "sizes": {"a": 36, "c": 20},
        "source_names": ["a"],
        "target_name": "c",
    }


def test_whole_number_names_sort_by_number(tmp_path):
    path = tmp_path / "n.npz"
    x = np.random.default_rng(0).normal(size=(24, 2))
    np.savez(path, a_x=x, a_y=np.arange(24) % 12, b_x=x, b_y=np.arange(24) % 12)
    data = DataModule(Arrays(path, kind="features"), "a", "b", batch_size=4)
    assert data.class_names == [str(i) for i in range(12)]
    assert torch.equal(collect(data.val_dataloader()[1])["y"], torch.arange(24) % 12)


def test_all_stages_run(trainer, recorder):
    data = DataModule(Generated(n=50), "source", "target", batch_size=8, eval_batch_size=16, num_workers=1)
    model = recorder()
    trainer(max_epochs=1, num_sanity_val_steps=2).fit(model, data)
    trainer().test(model, data)
    assert set(model.evaluated) == {0, 1}


def test_labelled_target_samples_are_asked_for_and_not_evaluated_on(npz):
    plain = DataModule(Arrays(npz), ["a"], "c", batch_size=4)
    assert plain.labelled is None
    assert "labelled" not in plain.train_dataloader().iterables
    source = DataModule(Arrays(npz), ["a"], "b", batch_size=4, labelled_target=2)
    known = source.labelled
    assert torch.bincount(known[known >= 0]).tolist() == [2] * source.num_classes
    shown = collect(source.val_dataloader()[-1])["y"]
    assert ((shown == -1) == (known >= 0)).all()
    batch = next(iter(source.train_dataloader().iterables["labelled"]))
    assert (known[batch["index"]] == batch["y"]).all()
    assert "y" not in next(iter(source.train_dataloader().iterables["target"]))
    with pytest.raises(UDAError, match="has no labels"):
        DataModule(Arrays(npz), ["a"], "c", labelled_target=2).task  # noqa: B018
    with pytest.raises(UDAError, match="ask for fewer"):
        DataModule(Arrays(npz), ["a"], "b", labelled_target=500).task  # noqa: B018
    with pytest.raises(UDAError, match="0 or more"):
        DataModule(Arrays(npz), ["a"], "b", labelled_target=-1)
