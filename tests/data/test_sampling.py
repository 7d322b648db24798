from __future__ import annotations

import numpy as np
import pytest
import torch

from uda.data import DataModule, Generated, valid_rows
from uda.data.samplers import ClassBalancedStream, UniformStream, rank_slice, shard
from uda.data.splits import split_by_class, split_by_index
from uda.plugin import DataNeeds


def test_a_stream_is_permutations_end_to_end():
    stream = UniformStream(7, seed=0, name="a")
    passes = [stream.take(7 * k, 7 * k + 7) for k in range(20)]
    assert all(sorted(p) == list(range(7)) for p in passes)
    assert len({tuple(p) for p in passes}) > 15
    assert np.array_equal(stream.take(0, 140), np.concatenate(passes))
    assert not np.array_equal(stream.take(0, 70), UniformStream(7, seed=1, name="a").take(0, 70))
    assert not np.array_equal(stream.take(0, 70), UniformStream(7, seed=0, name="b").take(0, 70))


def test_a_stream_has_no_state():
    used, fresh = UniformStream(11, 0, "a"), UniformStream(11, 0, "a")
    used.take(0, 500)
    assert np.array_equal(used.take(123, 140), fresh.take(123, 140))
    labels = np.repeat([0, 1, 2], [5, 2, 9])
    used, fresh = ClassBalancedStream(labels, 0, "a"), ClassBalancedStream(labels, 0, "a")
    used.take(0, 500)
    assert np.array_equal(used.take(123, 140), fresh.take(123, 140))


@pytest.mark.parametrize(
    "stream", [UniformStream(23, 0, "a"), ClassBalancedStream(np.arange(23) % 4, 0, "a")]
)
def test_ranks_share_out_the_global_batch(stream):
    for step in range(10):
        parts = [stream.take(*rank_slice(step, 3, rank, 4)) for rank in range(4)]
        assert np.array_equal(np.concatenate(parts), stream.take(*rank_slice(step, 12, 0, 1)))


def test_class_balance_and_coverage():
    labels = np.repeat([3, 5, 9], [50, 2, 7])
    stream = ClassBalancedStream(labels, 0, "a")
    order = stream.take(0, 3 * 50)
    assert (np.bincount(labels[order])[[3, 5, 9]] == 50).all()
    assert set(order) == set(range(59))
    rounds = labels[order].reshape(50, 3)
    assert (np.sort(rounds, axis=1) == [3, 5, 9]).all()
    assert len({tuple(r) for r in rounds}) == 6
    # each class walks whole permutations of its own
    seven = order[labels[order] == 9]
    assert sorted(seven[:7]) == sorted(seven[7:14]) == list(range(52, 59))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_shards_count_each_index_once(n, world):
    shards = [shard(n, rank, world) for rank in range(world)]
    assert len({len(s) for s in shards}) == 1
    kept = np.concatenate([s[valid_rows(s, rank, world)] for rank, s in enumerate(shards)])
    assert sorted(kept) == list(range(n))


def test_source_split_is_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [100, 30, 1])
    train, held = split_by_class(labels, 0.1, 0, "a")
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(131))
    assert np.bincount(labels[held], minlength=3).tolist() == [10, 3, 0]
    assert np.array_equal(held, split_by_class(labels, 0.1, 0, "a")[1])
    assert not np.array_equal(held, split_by_class(labels, 0.1, 1, "a")[1])
    assert len(split_by_class(np.array([0, 0, 1]), 0.1, 0, "a")[1]) == 1
    assert len(split_by_class(labels, 0.0, 0, "a")[1]) == 0


def test_index_split():
    train, held = split_by_index(50, 0.2, 0, "a", "test")
    assert len(held) == 10
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(50))
    assert not np.array_equal(held, split_by_index(50, 0.2, 0, "a", "held_out")[1])


def test_every_image_is_seen_before_one_comes_again(trainer, recorder):
    data = DataModule(Generated(n=60), "source", "target", batch_size=8, source_val_fraction=0, seed=0)
    model = recorder()
    trainer(max_epochs=4, limit_val_batches=0).fit(model, data)
    assert len(model.seen) == 4 * 8  # ceil(60 / 8)
    for key in ("sources/source", "target"):
        index = torch.cat([b[key]["index"] for b in model.seen])
        assert sorted(index[:60].tolist()) == sorted(index[60:120].tolist()) == list(range(60))
    source, target = (torch.cat([b[k]["index"] for b in model.seen]) for k in ("sources/source", "target"))
    assert not torch.equal(source, target)


def test_needs_decide_what_is_built(trainer, recorder):
    def keys(needs):
        data = DataModule(Generated(n=60), "source", "target", batch_size=8, seed=0)
        model = recorder(needs)
        trainer(max_steps=1, limit_val_batches=0).fit(model, data)
        return {k: set(b) for k, b in model.seen[0].items()}

    plain, labelled = {"x", "index"}, {"x", "index", "y"}
    assert keys(DataNeeds()) == {"sources/source": labelled, "target": plain}
    assert keys(DataNeeds(target=False)) == {"sources/source": labelled}
    assert keys(DataNeeds(source=False)) == {"target": plain}
    needs = DataNeeds(held_out=True, views=frozenset({"strong"}), source_views=frozenset({"weak"}))
    assert keys(needs) == {
        "sources/source": labelled | {"weak"},
        "target": plain | {"strong"},
        "held_out": plain | {"strong"},
    }


def test_held_out_images_are_in_no_target_batch(trainer, recorder):
    data = DataModule(Generated(n=60), "source", "target", batch_size=6, held_out_fraction=0.25, seed=0)
    model = recorder(DataNeeds(held_out=True))
    trainer(max_epochs=3, limit_val_batches=0).fit(model, data)
    target, held = ({int(i) for b in model.seen for i in b[k]["index"]} for k in ("target", "held_out"))
    assert len(held) == 15
    assert target == set(range(60)) - held


def test_class_balanced_by_need_and_by_setting(trainer, recorder, npz):
    from uda.data import Arrays

    for needs, sampling in (
        (DataNeeds(class_balanced=True), "uniform"),
        (DataNeeds(), "class_balanced"),
    ):
        data = DataModule(Arrays(npz), "a", "b", batch_size=8, sampling=sampling, seed=0)
        model = recorder(needs)
        trainer(max_epochs=1, limit_val_batches=0).fit(model, data)
        assert all((torch.bincount(b["sources/a"]["y"], minlength=4) == 2).all() for b in model.seen)


def test_seed_comes_from_the_environment(monkeypatch):
    def first(**kwargs):
        data = DataModule(Generated(n=60), "source", "target", batch_size=8, **kwargs)
        return next(iter(data.train_dataloader()))[0]["target"]["index"]

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert torch.equal(first(), first(seed=0))
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(first(), first(seed=7))
    assert not torch.equal(first(), first(seed=0))


def test_loading_leaves_the_random_numbers_alone(npz):
    from uda.data import Arrays, ImageViews

    data = DataModule(Arrays(npz), "a", "b", batch_size=8, views=ImageViews(6, 8))
    data.setup()
    torch.manual_seed(0)
    np.random.seed(0)
    for _ in zip(range(3), data.train_dataloader(), strict=False):
        pass
    assert torch.equal(torch.rand(3), torch.manual_seed(0) and torch.rand(3))
    value = np.random.rand()
    np.random.seed(0)
    assert value == np.random.rand()
