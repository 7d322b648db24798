"""RMT: a robust mean teacher, and features drawn to the prototypes of the source."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import (
    add_projector,
    all_parameters,
    class_prototypes,
    colour_view,
    nearest_prototype,
    same_prototype,
    symmetric_cross_entropy,
    view_contrast,
)
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import mix_statistics

Duplicates = Literal["negatives", "skipped"]


def check_duplicates(who: str, given: str) -> str:
    """One of the two choices."""
    if given not in ("negatives", "skipped"):
        raise UDAError(f"{who}: duplicates is 'negatives' or 'skipped', not {given!r}.")
    return given


def prototype_contrast(
    a: Adapter, features: Tensor, view: Tensor, temperature: float = 0.1, duplicates: Duplicates = "negatives"
) -> Tensor:
    """Contrast of (nearest prototype, sample, view), projected (RMT, eq. 4).

    Args:
        a: has ``prepared["prototypes"]`` and ``extra["projector"]``; features, view: ``[B, D]``.
        temperature: tau; duplicates: whether two samples' one and the same prototype repels itself, as published.
    """
    prototypes = a.prepared["prototypes"].to(features)
    features, view = features.flatten(1), view.flatten(1)
    nearest = nearest_prototype(prototypes, features)
    views = torch.stack([prototypes[nearest], features, view], 1)
    skip = same_prototype(nearest, 3) if duplicates == "skipped" else None
    return view_contrast(a.extra["projector"](views), temperature, skip)


class RMT(Method):
    """Symmetric cross-entropy with a mean teacher, and contrast with source prototypes (Doebler et al., CVPR 2023).

    ``L = weight * mean(SCE(z, t) + SCE(z', t)) / 2 + contrast * L_cl + replay * CE(source)``, all parameters trained.
    Scored: the sum of the net's and the teacher's logits, before the update.

    Args:
        lr: learning rate (Adam 1e-3 CIFAR-C, SGD 0.01 ImageNet-C); optimizer: ``adam`` or ``sgd``.
        weight, contrast, replay: of the three terms. Replay takes a labelled source batch that the caller gives beside
            the stream, ``a(x, side={"source_x": ..., "source_y": ...})``; without one the term is left out.
        momentum: of the teacher; temperature: of the contrast; width: of the projector, 0: none.
        duplicates: ``negatives`` (published): one prototype repels itself where two samples have it; ``skipped``.
        warmup: source samples seen before the stream, with a rate that rises linearly; 0: none.
        batch_size: of source batches. flip: views may be mirrored.
        source_weight: share of the source's BatchNorm statistics.
    """

    needs, scored = "labels", "net and teacher summed, before the update"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, contrast: float = 1.0,
        replay: float = 1.0, momentum: float = 0.999, temperature: float = 0.1, width: int = 128,
        duplicates: Duplicates = "negatives", warmup: int = 50_000, batch_size: int = 200, flip: bool = True,
        source_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.lr, self.optimizer, self.weight, self.contrast, self.replay = lr, optimizer, weight, contrast, replay
        self.momentum, self.temperature, self.width = momentum, temperature, width
        self.duplicates, self.warmup, self.batch_size = check_duplicates("RMT", duplicates), warmup, batch_size
        self.flip, self.source_weight = flip, source_weight

    def attach(self, a: Adapter) -> None:
        """Batch statistics, teacher and projector."""
        mix_statistics(a, self.source_weight)
        a.add("teacher", EMATeacher(a.net, buffers="none"))
        projector = add_projector(a, self.width)
        a.train_parameters(all_parameters(a, "RMT") + projector, self.optimizer, self.lr)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Prototypes of the source model, then the warm-up of net and teacher; its optimiser goes on."""
        a.prepared["prototypes"] = class_prototypes(a, source, self.batch_size)
        steps, done, teacher = self.warmup // self.batch_size, 0, a.extra["teacher"]
        while done < steps:
            for batch in source.batches(self.batch_size, a.generator):
                if done == steps:
                    break
                done += 1
                for group in a.optimizer.param_groups:
                    group["lr"] = self.lr * done / steps
                x = batch["x"].to(a.parameters[0].device)
                with torch.no_grad():
                    target = teacher(x)
                a.update(symmetric_cross_entropy(a.net(x), target).mean())
                teacher.update(a.net, self.momentum)
        a.updates = 0

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The sum of both logits."""
        return a.net(x) + a.extra["teacher"](x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Both logits, then one step."""
        teacher = a.extra["teacher"]
        features, z = a.features(x)
        view, z_view = a.features(colour_view(a, x, self.flip))
        with torch.no_grad():
            target = teacher(x)
        both = symmetric_cross_entropy(z, target) + symmetric_cross_entropy(z_view, target)
        loss = self.weight * both.mean() / 2
        if self.contrast:
            close = prototype_contrast(a, features, view, self.temperature, self.duplicates)
            loss = loss + self.contrast * close
        if self.replay and "source_x" in a.side:  # a forward of its own: BatchNorm must not mix the domains
            known, y = a.side["source_x"].to(x), a.side["source_y"].to(x.device)
            loss = loss + self.replay * F.cross_entropy(a.net(known), y)
        a.update(loss)
        teacher.update(a.net, self.momentum)
        return z.detach() + target
