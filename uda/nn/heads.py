"""What stands behind the backbone: bottleneck, classifier heads, domain discriminator."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError, nearest
from uda.nn.precision import no_autocast


class Bottleneck(nn.Module):
    """Linear, normalisation, ReLU and dropout: ``[B, in_features] -> [B, out_features]``.

    Linear-BatchNorm-ReLU of width 256 is the field's usual one (Long et al., 2018 and its
    re-implementations).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int = 256,
        norm: Literal["batch", "layer", "none"] = "batch",
        activation: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        norms = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}
        if norm not in norms:
            raise UDAError(f"Unknown norm {norm!r} of the bottleneck. {nearest(norm, norms)}")
        self.in_features, self.out_features = in_features, out_features
        self.net = nn.Sequential(nn.Linear(in_features, out_features), norms[norm](out_features))
        if activation:
            self.net.append(nn.ReLU())
        if dropout:
            self.net.append(nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_features] -> [B, out_features]``."""
        return self.net(x)


class LinearHead(nn.Module):
    """Linear classifier: ``[B, F] -> [B, C]``."""

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        self.linear = nn.Linear(in_features, num_classes, bias=bias)

    @property
    def weight_vectors(self) -> Tensor:
        """Class prototypes ``[C, F]``: the rows of the weight matrix, with gradient."""
        return self.linear.weight

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F] -> [B, C]``."""
        return self.linear(features)


class WeightNormHead(nn.Module):
    """Linear classifier with weight normalisation ``w_c = g_c v_c / |v_c|`` (Salimans & Kingma, 2016).

    Direction and length are plain parameters, so the head copies, pickles and compiles like any layer.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.num_classes = in_features, num_classes
        start = nn.Linear(in_features, num_classes, bias=bias)
        self.direction = nn.Parameter(start.weight.detach().clone())
        self.length = nn.Parameter(start.weight.detach().norm(dim=1, keepdim=True))
        self.bias = start.bias

    @property
    def weight_vectors(self) -> Tensor:
        """Class prototypes ``[C, F]``: the normalised rows at their learnt length, with gradient."""
        return F.normalize(self.direction, dim=1) * self.length

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F] -> [B, C]``."""
        return F.linear(features, self.weight_vectors, self.bias)


class CosineHead(nn.Module):
    """Cosine classifier ``cos(f, w_c) / temperature`` without bias (MME: Saito et al., 2019, T = 0.05).

    Computed in float32: divided by a small temperature, a half-precision cosine is off by a tenth of a logit.
    """

    def __init__(self, in_features: int, num_classes: int, temperature: float = 0.05) -> None:
        super().__init__()
        if temperature <= 0:
            raise UDAError(f"The temperature of a cosine head must be positive, not {temperature}.")
        self.in_features, self.num_classes, self.temperature = in_features, num_classes, temperature
        self.weight = nn.Parameter(nn.Linear(in_features, num_classes, bias=False).weight.detach().clone())

    @property
    def weight_vectors(self) -> Tensor:
        """Class prototypes ``[C, F]`` of unit length, with gradient."""
        return F.normalize(self.weight, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F] -> [B, C]``, at least float32."""
        with no_autocast(features):
            weight = self.weight_vectors
            features = features.to(torch.promote_types(features.dtype, weight.dtype))
            return F.normalize(features, dim=1) @ weight.to(features.dtype).T / self.temperature


_HEADS: dict[str, type[nn.Module]] = {
    "linear": LinearHead,
    "weight_norm": WeightNormHead,
    "cosine": CosineHead,
}


def make_head(kind: str, in_features: int, num_classes: int, **arguments: float) -> nn.Module:
    """A classifier head ``"linear"``, ``"weight_norm"`` or ``"cosine"``.

    Raises:
        UDAError: for an unknown kind.
    """
    if kind not in _HEADS:
        raise UDAError(f"Unknown head {kind!r}. {nearest(kind, _HEADS)}")
    return _HEADS[kind](in_features, num_classes, **arguments)


def class_vectors(head: nn.Module, who: str) -> Tensor:
    """The classifier's weight vectors ``[C, F]``, for what compares features with classes.

    Raises:
        UDAError: a deep head has none in the space of the features; ``who`` asked for them.
    """
    vectors = getattr(head, "weight_vectors", None)
    if vectors is None:
        raise UDAError(
            f"{who} compares features with the classifier's weight vectors, and a {type(head).__name__} has none: use "
            "a head with one vector a class (model.head: linear, weight_norm, cosine), and no plugin that replaces it."
        )
    return vectors


class DomainDiscriminator(nn.Module):
    """Tells domains apart: ``layers`` times Linear-BatchNorm-ReLU, then Linear to ``out_features`` logits.

    Two layers of 1024 are those of DANN and CDAN on Office data. With BatchNorm, give source and target in
    one concatenated batch: statistics of a single domain would give the domain away.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        out_features: int = 1,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        net: list[nn.Module] = []
        for _ in range(layers):
            net += [
                nn.Linear(in_features, hidden),
                *([nn.BatchNorm1d(hidden)] if batch_norm else []),
                nn.ReLU(),
            ]
            if dropout:
                net.append(nn.Dropout(dropout))
            in_features = hidden
        self.net = nn.Sequential(*net, nn.Linear(in_features, out_features))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_features] -> [B, out_features]``, logits."""
        return self.net(x)
