"""Bad input is named before the first step."""

from __future__ import annotations

import numpy as np
import pytest

from uda.data import (
    Arrays,
    ClassSplit,
    DataModule,
    Digits,
    Generated,
    ImageFolders,
    ImageLists,
    ImageViews,
    TensorViews,
)
from uda.errors import UDAError


def setup(reader, source="photo", target="sketch", **kwargs):
    kwargs = {"batch_size": 4, "views": ImageViews(8, 10), **kwargs}
    DataModule(reader, source, target, **kwargs).setup("fit")


def fails(match):
    return pytest.raises(UDAError, match=match)


def test_unknown_domain_gives_near_names(folders):
    with fails(r"unknown source domain 'foto' in ImageFolders \(no folder '.*foto'\)\. Did you mean 'photo'"):
        setup(ImageFolders(folders), "foto")
    with fails(r"unknown target domain 'sketchy'.*'sketch'"):
        setup(ImageFolders(folders), target="sketchy")
    with fails(r"unknown target domain 'handwriten'.*'handwritten'"):
        setup(Digits(10), "rendered", "handwriten")


def test_source_and_target_must_differ(folders):
    with fails("data.target is missing"):
        DataModule(ImageFolders(folders), "photo")
    with fails("'photo' is both source and target"):
        setup(ImageFolders(folders), "photo", "photo")
    with fails("named twice"):
        setup(ImageFolders(folders), ["photo", "photo"])


def test_missing_and_empty_folders(folders, tmp_path):
    with fails("does not exist"):
        setup(ImageFolders(tmp_path / "nowhere"))
    for file in (folders / "sketch").rglob("*.png"):
        file.unlink()
    with fails(r"sketch' holds no images; expected .*<class>/<image>"):
        setup(ImageFolders(folders))


def test_images_beside_class_folders(folders, make_image):
    make_image(folders / "sketch" / "stray.png", 0)
    with fails("directly inside and in class folders"):
        setup(ImageFolders(folders))


def test_missing_class_names_class_and_domain(folders):
    for file in (folders / "sketch" / "fox").iterdir():
        file.unlink()
    with fails("class 'fox' is missing in domain 'sketch'"):
        setup(ImageFolders(folders))
    setup(ImageFolders(folders), allow_missing_classes=True)
    setup(ImageFolders(folders), classes={"known": ["cat", "dog"], "source_private": ["fox"]})


def test_class_in_the_target_only(folders, make_image):
    make_image(folders / "sketch" / "zebra" / "1.png", 0)
    for allow in (False, True):
        with fails(r"class 'zebra' is in target 'sketch' but missing in source 'photo'.*target_private"):
            setup(ImageFolders(folders), allow_missing_classes=allow)


def test_unlabelled_source(npz):
    with fails("source domain 'c' has no labels"):
        setup(Arrays(npz), "c", "a", views=None)


def test_source_free_without_any_class(npz):
    with fails("no class is known"):
        setup(Arrays(npz), None, "c", views=None)
    data = DataModule(Arrays(npz), None, "c", batch_size=4, classes={"known": ["0", "1"]})
    assert data.num_classes == 2
    assert data.spec["source_names"] == []
    with fails("data.source is empty"):
        data.train_dataloader()


def test_unreadable_image_is_named(folders):
    (folders / "photo" / "cat" / "0.png").write_bytes(b"no image")
    data = DataModule(ImageFolders(folders), "photo", "sketch", batch_size=4, views=ImageViews(8, 10), seed=0)
    with fails(r"cannot read image .*photo/cat/0.png.*on_bad_image: skip"):
        data.setup("fit")
        for _ in data.train_dataloader():
            pass
        for loader in data.val_dataloader():
            for _ in loader:
                pass


def test_batch_larger_than_a_domain(folders):
    with fails(r"data.batch_size makes batches of 40, but domain 'photo' has only 13 training images"):
        setup(ImageFolders(folders), batch_size=40)
    with fails(r"data.target_batch_size makes batches of 16, but domain 'sketch' has only 15"):
        setup(ImageFolders(folders), target_batch_size=16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: a.update(a_x=np.where(np.arange(40)[:, None] == 7, np.nan, a["a_x"])),
            r"'a_x' has NaN.*row 7",
        ),
        (lambda a: a.update(a_y=a["a_y"][:-1]), r"'a_x' has 40 rows but 'a_y' has 39"),
        (lambda a: a.update(a_y=a["a_y"] + 0.5), "not whole numbers"),
        (lambda a: a.update(a_y=a["a_y"] - 3), "negative"),
        (lambda a: a.update(classes=np.array(["x", "y"])), "only 2 class names"),
        (lambda a: a.update(a_x=a["a_x"][:, 0]), "rows and columns"),
        (lambda a: a.update(b_x=a["b_x"][:, :4]), r"different shapes \(a: \[5\], b: \[4\]\)"),
        (lambda a: a.update(a_x=a["a_x"][:0], a_y=a["a_y"][:0]), "empty"),
    ],
)
def test_arrays(tmp_path, change, match):
    rng = np.random.default_rng(0)
    arrays = {f"{d}_x": rng.normal(size=(40, 5)) for d in "ab"} | {f"{d}_y": np.arange(40) % 4 for d in "ab"}
    change(arrays)
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with fails(match):
        setup(Arrays(path, kind="features"), "a", "b", views=None)


def test_heterogeneous_shapes_on_request(tmp_path):
    path = tmp_path / "a.npz"
    y = np.arange(20) % 2
    np.savez(path, a_x=np.ones((20, 5)), b_x=np.ones((20, 3)), a_y=y, b_y=y)
    data = DataModule(Arrays(path, kind="features"), "a", "b", batch_size=4, heterogeneous=True)
    data.setup("fit")
    assert data.input_shapes == {"a": (5,), "b": (3,)}
    assert data.input_shape == (5,)


def test_array_files_and_keys(npz, tmp_path):
    with fails(r"no key 'a_z' for domain 'a'. Did you mean 'a_x'|no key"):
        Arrays(npz, x_key="{domain}_z").read("a")
    with fails("does not exist"):
        Arrays(tmp_path / "none.npz").domains()
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with fails("cannot read array file"):
        Arrays(tmp_path / "bad.npz").domains()
    (tmp_path / "bad.csv").write_text("1,2")
    with fails(r"must end in .npz"):
        Arrays(tmp_path / "bad.csv").domains()
    with fails("telling domains apart"):
        Arrays(npz, x_key="x")
    with fails("set kind: features"):
        np.savez(tmp_path / "f.npz", a_x=np.ones((5, 3)))
        Arrays(tmp_path / "f.npz").read("a")
    with fails(r"must lie in \[0, 1\]"):
        np.savez(tmp_path / "f.npz", a_x=np.full((5, 8, 8), 255.0))
        Arrays(tmp_path / "f.npz").read("a")


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ({"known": []}, "classes.known is empty"),
        ({"known": ["cat"], "source_private": ["cat"]}, "'cat' is in classes.known and again"),
        ({"known": ["cat", "dgo"]}, r"names 'dgo', which is not in any source.*'dog'"),
        ({"known": ["cat"], "target_private": ["wolf"]}, r"names 'wolf', which is not in target 'sketch'"),
        ({"knwon": ["cat"]}, "takes known, source_private and target_private"),
    ],
)
def test_class_splits(folders, classes, match):
    with fails(match):
        setup(ImageFolders(folders), classes=classes)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"source_val_fraction": 1.0}, "source_val_fraction must be at least 0 and below 1"),
        ({"target_test_fraction": -0.1}, "target_test_fraction"),
        ({"held_out_fraction": 2}, "held_out_fraction"),
        ({"batch_size": 0}, "batch_size must be a whole number"),
        ({"epoch_steps": 0}, "epoch_steps"),
        ({"sampling": "balanced"}, "class_balanced"),
        ({"on_bad_image": "ignore"}, "stop, skip"),
    ],
)
def test_settings(kwargs, match):
    with fails(match):
        DataModule(Generated(), "source", "target", **kwargs)


def test_lists(folders, tmp_path):
    lists = tmp_path / "l.txt"
    lists.write_text("photo/cat/0.png 0\nphoto/dog/0.png\n")
    with fails("1 of 2 lines have no label"):
        ImageLists(folders, {"a": str(lists)}).read("a")
    lists.write_text("photo/cat/0.png 5\n")
    with fails(r"l.txt, line 1: label '5' is none of the 2 class_names"):
        ImageLists(folders, {"a": str(lists)}, ["cat", "dog"]).read("a")
    lists.write_text("# nothing\n")
    with fails("names no image"):
        ImageLists(folders, {"a": str(lists)}).read("a")
    with fails(r"list file .*none.txt' does not exist"):
        ImageLists(folders, {"a": "none.txt"}).read("a")
    lists.write_text("cat/0.png 0\ndog/0.png 1\n")
    with fails(
        r"domain 'a': 2 of 2 listed files that were looked up do not exist, '.*cat/0.png'.*check root"
    ):
        ImageLists(folders, {"a": str(lists)}).read("a")
    ImageLists(folders / "photo", {"a": str(lists)}).read("a")


def test_views(npz):
    for wrong in (
        lambda: ImageViews(224, 200),
        lambda: ImageViews(mean=None),
        lambda: TensorViews(train="hard"),
        lambda: TensorViews(channels=2),
    ):
        with pytest.raises(UDAError):
            wrong()
    with fails("FeatureViews for features"):
        setup(Generated(), "source", "target", views=TensorViews())


def test_held_out_share_of_zero(trainer, recorder):
    from uda.plugin import DataNeeds

    data = DataModule(Generated(), "source", "target", held_out_fraction=0)
    with fails("held_out_fraction above 0"):
        trainer(max_steps=1).fit(recorder(DataNeeds(held_out=True)), data)


def test_unknown_stage_and_domain():
    data = DataModule(Generated(), "source", "target")
    with fails("no evaluation loaders"):
        data.eval_domains("train")
    with fails("takes no part"):
        data.pool_dataloader("target2")


def test_a_class_split_is_plain_text():
    assert ClassSplit([1, 2], [3]).known == ["1", "2"]
