from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from uda.data import Arrays, DataModule, Datasets, Digits, Generated, ImageFolders, ImageLists, ImageViews
from uda.described import describe


def by_class(data):
    return torch.bincount(data.labels, minlength=len(data.class_names)).tolist()


def test_folders(folders, make_image):
    reader = ImageFolders(folders)
    assert reader.domains() == ["photo", "sketch"]
    data = reader.read("photo")
    assert data.class_names == ["cat", "dog", "fox"]
    assert by_class(data) == [6, 5, 4]
    assert all(i.split("/")[-2] == data.class_names[y] for i, y in zip(data.ids, data.labels, strict=True))
    image = data.inputs.fetch(torch.tensor([3]))[0]
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(data.ids[3])))
    make_image(folders / "photo" / "cat" / "deeper" / "1.PNG", 0)
    (folders / "photo" / "cat" / "notes.txt").write_text("no image")
    (folders / "photo" / "cat" / ".hidden.png").write_bytes(b"")
    (folders / "photo" / ".cache").mkdir()
    (folders / "readme.md").write_text("no domain")
    assert by_class(ImageFolders(folders).read("photo")) == [7, 5, 4]


def test_lists(folders, tmp_path):
    (folders / "photo" / "cat" / "with blank.png").write_bytes((folders / "photo/cat/0.png").read_bytes())
    (tmp_path / "train.txt").write_text("photo/cat/0.png 0\nphoto/dog/0.png\t1\n\n")
    (tmp_path / "test.txt").write_text("photo/cat/with blank.png 0\n")
    (tmp_path / "bare.txt").write_text("photo/cat/0.png\nphoto/cat/with blank.png\n")
    both = f"{tmp_path / 'train.txt'}, {tmp_path / 'test.txt'}"
    reader = ImageLists(folders, {"a": both, "b": str(tmp_path / "bare.txt")}, ["cat", "dog"])
    assert reader.domains() == ["a", "b"]
    data = reader.read("a")
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [0, 1, 0]
    assert len(data.inputs.fetch(torch.arange(3))) == 3
    bare = reader.read("b")
    assert bare.labels is None
    assert len(bare) == 2
    assert ImageLists(folders, {"a": both}).read("a").class_names == ["0", "1"]


def test_images_in_arrays(npz):
    reader = Arrays(npz)
    assert reader.domains() == ["a", "b", "c"]
    data = reader.read("a")
    stored = np.load(npz)["a_x"]
    assert data.inputs.x.dtype == torch.uint8  # kept small, scaled when fetched
    batch = data.inputs.fetch(torch.tensor([5, 2]))
    assert batch.shape == (2, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert np.allclose(batch.numpy(), stored[[5, 2]].transpose(0, 3, 1, 2) / 255)
    assert reader.read("c").labels is None


@pytest.mark.parametrize(
    ("shape", "layout", "want"),
    [
        ((6, 9, 7), "auto", (1, 9, 7)),
        ((6, 9, 7, 3), "auto", (3, 9, 7)),
        ((6, 3, 9, 7), "auto", (3, 9, 7)),
        ((6, 3, 9, 3), "channels_last", (3, 3, 9)),
        ((6, 9, 7, 4), "auto", (3, 9, 7)),
        ((6, 1, 9, 7), "auto", (1, 9, 7)),
    ],
)
def test_image_layouts(tmp_path, shape, layout, want):
    np.savez(tmp_path / "a.npz", d_x=np.zeros(shape, dtype=np.uint8))
    assert Arrays(tmp_path / "a.npz", layout=layout).read("d").inputs.x.shape[1:] == want


def test_features_pt_and_mat(tmp_path):
    from scipy.io import savemat

    x, y = np.random.default_rng(0).normal(3, 5, size=(8, 4)), np.arange(8) % 2 + 1
    torch.save({"a_x": torch.from_numpy(x), "a_y": torch.from_numpy(y)}, tmp_path / "a.pt")
    pt = Arrays(tmp_path / "a.pt", kind="features").read("a")
    assert np.allclose(pt.inputs.fetch(torch.arange(8)), x)
    assert pt.class_names == ["1", "2"]
    for name in ("amazon", "dslr"):
        savemat(tmp_path / f"{name}_SURF.mat", {"fts": x, "labels": y.reshape(-1, 1)})
    reader = Arrays(str(tmp_path / "{domain}_SURF.mat"), "fts", "labels", "features", normalise="zscore")
    assert reader.domains() == ["amazon", "dslr"]
    data = reader.read("dslr")
    batch = data.inputs.fetch(torch.arange(8))
    assert np.allclose(batch.mean(0), 0, atol=1e-6)
    assert np.allclose(batch.std(0, correction=0), 1, atol=1e-5)
    assert data.labels.tolist() == (y - 1).tolist()
    l2 = Arrays(tmp_path / "a.pt", kind="features", normalise="l2").read("a").inputs.fetch(torch.arange(8))
    assert np.allclose(l2.norm(dim=1), 1, atol=1e-6)


def test_class_names_in_the_file(tmp_path):
    np.savez(tmp_path / "a.npz", d_x=np.ones((3, 2)), d_y=[2, 0, 2], classes=["a", "b", "c"])
    data = Arrays(tmp_path / "a.npz", kind="features").read("d")
    assert data.class_names == ["a", "b", "c"]
    assert data.labels.tolist() == [2, 0, 2]
    np.savez(tmp_path / "a.npz", d_x=np.ones((3, 2)), d_y=["dog", "cat", "dog"])
    data = Arrays(tmp_path / "a.npz", kind="features").read("d")
    assert data.class_names == ["cat", "dog"]
    assert data.labels.tolist() == [1, 0, 1]


def test_digits():
    reader = Digits(100)
    assert reader.domains() == ["rendered", "handwritten"]
    rendered, handwritten = reader.read("rendered"), reader.read("handwritten")
    assert len(rendered) == 100
    assert len(handwritten) == 1797
    assert rendered.class_names == handwritten.class_names == [str(i) for i in range(10)]
    assert rendered.inputs.fetch(torch.tensor([0])).shape == (1, 1, 8, 8)


@pytest.mark.parametrize("kind", ["moons", "blobs", "classification"])
def test_generated_domains_differ_by_the_shift_alone(kind):
    still = Generated(kind, n=400, rotation=0, targets=2)
    assert still.domains() == ["source", "target", "target2"]
    turned = Generated(kind, n=400, rotation=90, translation=1, targets=2)
    for k, name in enumerate(still.domains()):
        a, b = still.read(name), turned.read(name)
        x, y = (d.inputs.fetch(torch.arange(400)) for d in (a, b))
        want = x.clone()
        for _ in range(k):
            want = torch.stack([-want[:, 1], want[:, 0]], dim=1)
        assert torch.allclose(y, want + k, atol=1e-5)
        assert torch.equal(a.labels, b.labels)
        assert a.labels.bincount().min() > 150
    # without a shift a classifier of the source holds on the target: the draws are of one problem
    from sklearn.neighbors import KNeighborsClassifier

    source, target = still.read("source"), still.read("target")
    model = KNeighborsClassifier().fit(source.inputs.x, source.labels)
    assert model.score(target.inputs.x, target.labels) > 0.85


class Pairs(Dataset):
    classes = ("cat", "dog")

    def __init__(self, n, pil):
        self.n, self.pil = n, pil

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        array = np.full((10, 10, 3), i, dtype=np.uint8)
        return (Image.fromarray(array) if self.pil else torch.from_numpy(array).permute(2, 0, 1)), i % 2


@pytest.mark.parametrize("pil", [True, False])
def test_torch_datasets(pil):
    kwargs = {"batch_size": 4, "views": ImageViews(8, 10)} if pil else {"batch_size": 4}
    data = DataModule.from_datasets(Pairs(20, pil), Pairs(12, pil), **kwargs)
    assert data.class_names == ["cat", "dog"]
    assert data.sizes["target"] == 12
    assert data.input_shape == ((3, 8, 8) if pil else (3, 10, 10))
    assert next(iter(data.train_dataloader()))[0]["target"]["x"].shape[0] == 4
    several = DataModule.from_datasets({"a": Pairs(8, pil), "b": Pairs(8, pil)}, Pairs(8, pil), **kwargs)
    assert several.source_names == ["a", "b"]
    assert Datasets(a=Pairs(8, pil)).domains() == ["a"]


def test_tensor_datasets_are_features():
    x, y = torch.rand(30, 5), torch.arange(30) % 3
    data = DataModule.from_datasets(TensorDataset(x, y), TensorDataset(x), batch_size=4)
    assert data.input_shape == (5,)
    assert data.num_classes == 3
    assert (next(iter(data.val_dataloader()[1]))["y"] == -1).all()


def test_readers_and_views_can_be_described(folders):
    assert describe(ImageFolders(str(folders)))["init_args"] == {"root": str(folders)}
    assert describe(ImageViews(64, 72, crop="center")) == {
        "class_path": "uda.data.views.ImageViews",
        "init_args": {"size": 64, "resize": 72, "crop": "center"},
    }


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, uda.data\n"
        "import uda.data.readers, uda.data.views, uda.data.arrays, uda.data.generated, uda.data.classes\n"
        "bad = {'matplotlib', 'sklearn', 'scipy', 'torchvision', 'lightning', 'PIL'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("file", "source", "target", "kind", "shape"),
    [
        ("digits.npz", "mnist_train", "usps_train", "images", (1, 28, 28)),
        ("pacs_efficientnet_lite0.npz", "photo", "cartoon", "features", (1280,)),
        ("office_caltech10.npz", "surf_A", "surf_C", "features", (800,)),
        ("amazon_minilm.npz", "books", "dvd", "features", (384,)),
    ],
)
def test_shared_arrays(shared, file, source, target, kind, shape):
    data = DataModule(Arrays(shared / file, kind=kind), source, target)
    data.setup("fit")
    assert data.input_shape == shape
    assert next(iter(data.train_dataloader()))[0]["target"]["x"].shape == (32, *shape)


def test_shared_photos(shared):
    data = DataModule(
        ImageFolders(shared / "pacs"), "photo", "cartoon", batch_size=4, views=ImageViews(32, 40)
    )
    data.setup("fit")
    assert data.num_classes == 7
    assert data.sizes["cartoon"] == 2344
    assert next(iter(data.train_dataloader()))[0]["target"]["x"].shape == (4, 3, 32, 32)
