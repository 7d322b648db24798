"""SANTA: a frozen source model as anchor, and features drawn to the prototypes of the source."""

from __future__ import annotations

import torch
from torch import Tensor

from uda.errors import UDAError
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import add_projector, class_prototypes, colour_view, cross_entropy
from uda_testtime.rmt import Duplicates, check_duplicates, prototype_contrast
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import mix_statistics, norm_parameters


class SANTA(Method):
    """Source anchoring and target alignment (Chakrabarty et al., TMLR 2023).

    ``L = anchor * mean(CE(p, p0) + CE(p', p0)) / 2 + contrast * L_cl``: in ``CE(p, p0) = -sum p log p0`` the net's
    prediction weighs the frozen source model's log-probabilities, and the gradient flows through p. Scale and shift of
    normalisation layers and a projector are trained. Scored: the logits before the update; with ``lr=0`` that is
    :class:`~uda_testtime.BNStatistics`.

    Args:
        lr: learning rate (Adam 1e-3 CIFAR-C, SGD 0.01 ImageNet-C); optimizer: ``adam`` or ``sgd``.
        anchor, contrast: of the two terms.
        temperature, width, duplicates, batch_size, flip: as in :class:`~uda_testtime.RMT`.
        source_weight: share of the source's BatchNorm statistics, of net and anchor.
    """

    needs = "labels"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", anchor: float = 1.0, contrast: float = 1.0,
        temperature: float = 0.1, width: int = 128, duplicates: Duplicates = "negatives", batch_size: int = 200,
        flip: bool = True, source_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.lr, self.optimizer, self.anchor, self.contrast = lr, optimizer, anchor, contrast
        self.temperature, self.width, self.duplicates = temperature, width, check_duplicates("SANTA", duplicates)
        self.batch_size, self.flip, self.source_weight = batch_size, flip, source_weight

    def attach(self, a: Adapter) -> None:
        """Batch statistics, the anchor and the projector."""
        mix_statistics(a, self.source_weight)
        if not (parameters := norm_parameters(a.net)):
            raise UDAError("SANTA: the model has no normalisation layer with scale and shift to train.")
        a.add("anchor", a.copy())
        a.train_parameters(parameters + add_projector(a, self.width), self.optimizer, self.lr)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Prototypes of the source."""
        a.prepared["prototypes"] = class_prototypes(a, source, self.batch_size)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, then one step."""
        features, z = a.features(x)
        view, z_view = a.features(colour_view(a, x, self.flip))
        with torch.no_grad():
            anchor = a.extra["anchor"](x)
        loss = self.anchor * (cross_entropy(z, anchor) + cross_entropy(z_view, anchor)).mean() / 2
        if self.contrast:
            close = prototype_contrast(a, features, view, self.temperature, self.duplicates)
            loss = loss + self.contrast * close
        a.update(loss)
        return z
