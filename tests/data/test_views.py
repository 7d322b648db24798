from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from uda.data import DataModule, FeatureViews, ImageViews, TensorViews, Views
from uda.data.tensor_views import jitter
from uda.data.views import IMAGENET_MEAN, IMAGENET_STD
from uda.errors import UDAError

NAMES = ("train", "weak", "strong", "test")


@pytest.fixture(scope="module")
def photos():
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (25, 60), (50, 50)]
    return [Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


CASES = {
    "photographs": ImageViews(16, 20),
    "tensors": TensorViews(train="weak"),
    "features": FeatureViews(),
}


def raw(case, photos):
    generator = torch.Generator().manual_seed(0)
    shape = {"tensors": (3, 1, 12, 12), "features": (3, 20)}.get(case)
    return photos if shape is None else torch.rand(shape, generator=generator)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("view", NAMES)
def test_a_view_is_a_function_of_its_seed(case, view, photos):
    views, x = CASES[case], raw(case, photos)
    first = views.apply(x, view, 5)
    torch.rand(7)
    assert torch.equal(first, views.apply(x, view, 5))
    fixed = view == "test" or (case == "features" and view == "train")
    assert torch.equal(first, views.apply(x, view, 6)) == fixed
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()


def test_test_view_is_resize_centre_crop_and_normalise():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    got = ImageViews(16, 20).apply([image], "test", 0)[0]
    crop = torch.from_numpy(np.asarray(image)[2:18, 2:18].transpose(2, 0, 1).copy()) / 255
    mean, std = torch.tensor(IMAGENET_MEAN).reshape(3, 1, 1), torch.tensor(IMAGENET_STD).reshape(3, 1, 1)
    assert torch.allclose(got, (crop - mean) / std, atol=1e-6)
    plain = ImageViews(16, 20, mean=None, std=None).apply([image], "test", 0)[0]
    assert torch.allclose(plain, crop, atol=1e-6)


def test_centre_crop_training_without_flip_is_the_test_view(photos):
    views = ImageViews(16, 20, crop="center", flip=False)
    assert torch.equal(views.apply(photos, "train", 3), views.apply(photos, "test", 3))


def test_strong_departs_further_than_weak(photos):
    views = ImageViews(16, 18, mean=None, std=None)
    plain = views.apply(photos, "test", 0)
    far = {v: np.mean([(views.apply(photos, v, s) - plain).abs().mean() for s in range(20)]) for v in NAMES}
    assert far["test"] == 0 < far["weak"] < far["strong"]
    smooth = torch.rand(64, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(smooth, (12, 12), mode="bilinear")
    views = TensorViews()
    far = {v: (views.apply(x, v, 1) - x).abs().mean() for v in NAMES}
    assert far["test"] == far["train"] == 0 < far["weak"] < far["strong"]


def test_jitter_moves_by_whole_pixels_and_fills():
    x = torch.rand(64, 2, 9, 11)
    moved = jitter(x, 2, 0, torch.Generator().manual_seed(0), fill=0.5)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2), value=0.5)
    for before, after in zip(padded, moved, strict=True):
        shifts = [before[:, i : i + 9, j : j + 11] for i in range(5) for j in range(5)]
        assert any(torch.allclose(after, s, atol=1e-4) for s in shifts)
    assert not torch.allclose(moved, x)


def test_jitter_turns_about_the_centre():
    x = torch.zeros(50, 1, 21, 21)
    x[:, :, 10, 10] = 1
    turned = jitter(x, 0, 45, torch.Generator().manual_seed(0))
    assert torch.allclose(turned[:, 0, 10, 10], torch.ones(50), atol=1e-4)
    x = torch.zeros(50, 1, 21, 21)
    x[:, :, 10, 18] = 1
    turned = jitter(x, 0, 45, torch.Generator().manual_seed(0))[:, 0]
    mass = turned.sum((1, 2))
    grid = torch.arange(21.0) - 10
    dx, dy = (turned.sum(1) * grid).sum(1) / mass, (turned.sum(2) * grid).sum(1) / mass
    assert torch.allclose((dx**2 + dy**2).sqrt(), torch.full((50,), 8.0), atol=0.2)
    assert dy.abs().max() < 8 * np.sin(np.pi / 4) + 0.2
    assert dy.abs().max() > 4


def test_tensors_are_brought_to_one_shape_and_normalised():
    views = TensorViews(size=14, channels=3, mean=0.5, std=0.25)
    grey, colour = torch.full((2, 1, 28, 28), 0.75), torch.full((2, 3, 14, 14), 0.75)
    for x in (grey, colour):
        out = views.apply(x, "test", 0)
        assert out.shape == (2, 3, 14, 14)
        assert torch.allclose(out, torch.ones_like(out), atol=1e-5)
    assert TensorViews(channels=1).apply(colour, "test", 0).shape == (2, 1, 14, 14)


def test_features_keep_scale():
    x = 100 * torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    views = FeatureViews(weak_noise=0.1, strong_noise=0.0, dropout=0.25)
    weak, strong = views.apply(x, "weak", 0), views.apply(x, "strong", 0)
    assert abs(((weak - x).std() / 10).item() - 1) < 0.05
    assert abs((strong == 0).float().mean().item() - 0.25) < 0.01
    assert torch.allclose(strong[strong != 0], x[strong != 0] / 0.75)


def test_own_transforms():
    def to_tensor(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8))).copy()).permute(2, 0, 1) / 255

    def noisy(image):
        return to_tensor(image) + torch.rand(1) + float(np.random.rand())

    views = Views(train=noisy, test=to_tensor)
    images = [Image.new("RGB", (10 + i, 10)) for i in range(3)]
    assert torch.equal(views.apply(images, "weak", 1), views.apply(images, "weak", 1))
    assert not torch.equal(views.apply(images, "train", 1), views.apply(images, "train", 2))
    assert views.apply(images, "test", 0).max() == 0
    with pytest.raises(UDAError, match="different shapes"):
        Views().apply(images, "test", 0)
    with pytest.raises(UDAError, match="must give a tensor"):
        Views(test=lambda image: image).apply(images, "test", 0)


def test_default_views_bring_small_images_together(tmp_path):
    from uda.data import Arrays

    rng = np.random.default_rng(0)
    y = np.arange(20) % 2
    np.savez(
        tmp_path / "a.npz",
        grey_x=rng.integers(0, 255, (20, 16, 16), dtype=np.uint8),
        colour_x=rng.integers(0, 255, (20, 28, 28, 3), dtype=np.uint8),
        grey_y=y,
        colour_y=y,
    )
    data = DataModule(Arrays(tmp_path / "a.npz"), "grey", "colour", batch_size=4)
    data.setup("fit")
    assert data.input_shape == (3, 28, 28)
