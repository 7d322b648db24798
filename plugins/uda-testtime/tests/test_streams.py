"""Streams, walks along them, and corrupted domains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import TENT, Adapter, BNStatistics, Guard, Source
from uda_testtime.streams import SETTINGS, Shift, Stream
from uda_testtime.walk import Walk, start_stream

from uda.errors import UDAError


def net(features: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)).eval()


def shifts(n: int = 30) -> list[Shift]:
    x = torch.randn(3, n, 4, generator=torch.Generator().manual_seed(1))
    return [Shift(f"s{i}", x[i] + i, np.arange(n) % 3) for i in range(3)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("size", [1, 8])
def test_every_sample_comes_once(setting, size):
    stream = Stream(shifts(), setting, size, seed=3)
    rows = np.concatenate([b.rows for b in (stream[i] for i in range(len(stream)))])
    assert len({tuple(r) for r in rows}) == len(rows) == 90
    batch = stream[5]
    for x, y, (s, i) in zip(batch.x, batch.y, batch.rows, strict=True):
        assert torch.equal(x, shifts()[s].x[i])
        assert y == i % 3
    if "mixed" not in setting:
        assert all(len(np.unique(stream[i].rows[:, 0])) == 1 for i in range(len(stream)))
    borders = [i for i in range(len(stream)) if stream[i].border]
    assert len(borders) == (2 if setting == "reset" else 0)
    assert Stream(shifts(), setting, size, seed=3).fingerprint() == stream.fingerprint()
    if setting != "stored":
        assert Stream(shifts(), setting, size, seed=4).fingerprint() != stream.fingerprint()


def test_limit_takes_the_same_share_of_each_shift():
    stream = Stream(shifts(), "mixed", 8, limit=10)
    assert np.bincount(stream.rows[:, 0]).tolist() == [10, 10, 10]


def test_correlated_streams_are_correlated():
    def changes(**given):
        stream = Stream(shifts(), batch_size=8, **given)
        return (np.diff([stream.labels[s][i] for s, i in stream.rows]) != 0).sum()

    assert changes(setting="correlated") <= 8
    assert changes(setting="correlated") < changes(setting="correlated", delta=0.05) < changes(setting="continual")


def test_streams_that_cannot_be_walked_are_refused_before():
    good = shifts()
    for bad, told in (
        ([], "empty"), ([Shift("none", torch.zeros(0, 4))], "empty"),
        ([good[0], Shift("wide", torch.zeros(3, 5))], "shape"),
        ([Shift("hole", torch.full((3, 4), float("nan")))], "NaN"), ([Shift("off", good[0].x, np.zeros(3))], "labels"),
    ):  # fmt: skip
        with pytest.raises(UDAError, match=told):
            Stream(bad)
    with pytest.raises(UDAError, match="every label"):
        Stream([Shift("bare", good[0].x)], "correlated")
    with pytest.raises(UDAError, match="continual"):
        Stream(good, "continuos")
    with pytest.raises(UDAError, match="1 or more"):
        Stream(good, batch_size=0)
    with pytest.raises(UDAError, match="does not take"):
        start_stream(Adapter(net(5), TENT()), Stream(good))
    with pytest.raises(UDAError, match="labels up to 7"):
        Walk(Adapter(net(), TENT()), Stream([Shift("more", good[0].x, np.full(30, 7))]))


@pytest.mark.parametrize("setting", ["reset", "mixed"])
def test_a_walk_is_the_adapter_batch_by_batch(setting):
    stream, a = Stream(shifts(), setting, 8), Adapter(net(), TENT(lr=0.05))
    walk = Walk(Adapter(net(), TENT(lr=0.05)), stream).run()
    wrong = []
    for i in range(len(stream)):
        batch = stream[i]
        if batch.border:
            a.reset_weights()
        found = a(batch.x).argmax(1).numpy()
        assert (found == walk.labels[slice(*stream._bounds[i])]).all()
        wrong += (found != batch.y).tolist()
    figures = walk.figures()
    assert figures["oracle_error"] == pytest.approx(100 * np.mean(wrong))
    assert figures["oracle_shift_mean_error"] == pytest.approx(np.mean(list(figures["oracle_error_by_shift"].values())))
    assert sum(r["oracle_errors"] for r in walk.logs) == sum(wrong)
    if setting == "reset":  # each shift as if it were the first
        alone = Walk(Adapter(net(), TENT(lr=0.05)), Stream(shifts(), setting, 8))
        alone.done = 8
        alone.run()
        assert (alone.labels[60:] == walk.labels[60:]).all()


@pytest.mark.parametrize("size", [1, 8])
def test_a_resumed_walk_equals_an_undisturbed_one(size, tmp_path):
    def walk() -> Walk:
        adapter = Adapter(net(), TENT(lr=0.3), guard=Guard(window=16, top_share=0.7), updates_per_batch=0.5)
        return Walk(adapter, Stream(shifts(), "mixed_correlated", size, delta=0.1))

    whole, first, second = walk().run(), walk().run(5), walk()
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    second.run()
    assert second.finished
    assert (second.labels == whole.labels).all()
    assert (second.scores == whole.scores).all()  # bit for bit
    a, b = whole.adapter.snapshot(), second.adapter.snapshot()
    assert all(torch.equal(p, q) for p, q in zip(a["parameters"], b["parameters"], strict=True))
    assert a["counts"] == b["counts"]
    assert [r["oracle_errors"] for r in second.logs] == [r["oracle_errors"] for r in whole.logs]


def test_a_state_of_something_else_is_refused(tmp_path):
    walk = Walk(Adapter(net(), TENT()), Stream(shifts(), batch_size=8)).run(2)
    walk.save(tmp_path / "state.pt")
    for other, told in (
        (Walk(Adapter(net(), BNStatistics()), Stream(shifts(), batch_size=8)), "of TENT, not of BNStatistics"),
        (Walk(Adapter(net(), TENT()), Stream(shifts(), batch_size=4)), "another stream"),
    ):
        with pytest.raises(UDAError, match=told):
            other.load(tmp_path / "state.pt")
    torch.save([], tmp_path / "other.pt")
    with pytest.raises(UDAError, match="no state"):
        walk.load(tmp_path / "other.pt")
    with pytest.raises(UDAError, match="cannot be read"):
        walk.load(tmp_path / "absent.pt")


def test_without_labels_there_are_predictions_and_no_error():
    walk = Walk(Adapter(net(), Source()), Stream([Shift("bare", shifts()[0].x)], batch_size=7)).run()
    assert (walk.labels >= 0).all()
    assert walk.figures()["oracle_error"] is None


def test_precision_and_modes():
    stream = Stream(shifts(), batch_size=8)
    half = Walk(Adapter(net(), TENT()), stream, torch.bfloat16).run()
    assert (half.labels == Walk(Adapter(net(), TENT()), stream).run().labels).mean() > 0.9
    with pytest.raises(UDAError, match="bfloat16"):
        Walk(Adapter(net(), TENT()), stream, torch.float16).run(1)
    compiled = net()
    compiled.compile()  # in place: the copy runs uncompiled
    with torch.inference_mode():
        found = Walk(Adapter(compiled, TENT()), stream).run()
    assert (found.scores == Walk(Adapter(net(), TENT()), stream).run().scores).all()
    with pytest.raises(UDAError, match=r"torch\.compile"):
        Adapter(nn.Sequential(torch.compile(net())), TENT())


# ------------------------------------------------------------------------------------------------- corruptions


def pictures(n: int = 3) -> np.ndarray:
    return (np.random.default_rng(0).random((n, 16, 16, 3)) * 255).astype(np.uint8)


def test_corruptions_are_a_function_of_their_arguments(tmp_path):
    pytest.importorskip("corrupt_tta")
    from uda_testtime.corruptions import corrupt_images

    state = np.random.get_state()[1].copy()
    for name in ("impulse_noise", "shot_noise", "contrast"):
        one = corrupt_images(pictures(), name, 5, cache=tmp_path)
        assert one.shape == pictures().shape
        assert not (one == pictures()).all()
        assert (one == corrupt_images(pictures(), name, 5)).all()  # from the cache as made again
        assert (one[1:2] == corrupt_images(pictures(), name, 5)[1:2]).all()
    assert (np.random.get_state()[1] == state).all()
    assert len(list(tmp_path.iterdir())) == 3
    first, other = (corrupt_images(pictures(), "shot_noise", 5, seed=s, cache=tmp_path) for s in (0, 1))
    assert not (first == other).all()
    gray = corrupt_images(pictures()[..., 0], "contrast", 1)
    assert gray.shape == (3, 16, 16)
    for given, told in (
        ((pictures(), "fogg"), "fog"), ((pictures(), "fog", 6), "1 to 5"), ((pictures() / 255, "fog"), "uint8"),
    ):  # fmt: skip
        with pytest.raises(UDAError, match=told):
            corrupt_images(*given)


def test_corrupted_domains_of_a_reader(tmp_path):
    pytest.importorskip("corrupt_tta")
    from uda_testtime.corruptions import Corruptions

    from uda.data import Arrays

    np.savez(tmp_path / "a.npz", photo_x=pictures(), photo_y=np.arange(3))
    reader = Corruptions(Arrays(str(tmp_path / "a.npz")), severity=3, cache=str(tmp_path / "cache"))
    assert "photo/contrast" in reader.domains()
    clean, mild, hard = (reader.read(f"photo{tail}") for tail in ("", "/contrast", "/contrast/5"))
    rows = torch.arange(3)
    spread = [float(d.inputs.fetch(rows).std()) for d in (clean, mild, hard)]
    assert spread[0] > spread[1] > spread[2] > 0
    assert hard.labels.tolist() == [0, 1, 2]
    with pytest.raises(UDAError, match="photo/contrast"):
        reader.read("photo/contrst")


def test_corrupted_image_files(tmp_path):
    """Files are resized, corrupted as arrays are, cached, and keep the order and ids of their paths."""
    pytest.importorskip("corrupt_tta")
    from PIL import Image
    from uda_testtime.corruptions import Corruptions, corrupt_images

    from uda.data import ImageFolders

    for i, picture in enumerate(pictures(4)):
        folder = tmp_path / "photo" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).resize((20 + i, 24)).save(folder / f"{i}.png")
    files = ImageFolders(str(tmp_path))
    clean, reader = files.read("photo"), Corruptions(files, 4, cache=str(tmp_path / ".cache"), size=16)
    assert reader.read("photo").inputs.kind == "files"  # the clean domain is as it was
    found = reader.read("photo/contrast")
    assert found.labels.tolist() == clean.labels.tolist() == [0, 0, 1, 1]
    assert list(found.ids) == list(clean.ids)
    assert (found.inputs.order() == clean.inputs.order()).all()
    resized = np.stack([np.asarray(clean.inputs.load(i).resize((16, 16))) for i in range(4)])
    wanted = torch.from_numpy(corrupt_images(resized, "contrast", 4)).permute(0, 3, 1, 2) / 255
    assert torch.equal(found.inputs.fetch(torch.arange(4)), wanted)
    assert [p.name.split("-")[0] for p in (tmp_path / ".cache").iterdir()] == ["contrast"]
    assert torch.equal(reader.read("photo/contrast").inputs.fetch(torch.arange(4)), wanted)
    with pytest.raises(UDAError, match="give size"):
        Corruptions(files).read("photo/fog")
    (tmp_path / "photo" / "class0" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UDAError, match=r"broken\.png"):
        Corruptions(files, size=16).read("photo/fog")
