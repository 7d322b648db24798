"""AdaContrast: pseudo-labels refined by neighbours, and contrast between views of the stream's samples."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.transforms import functional as T

from uda.errors import UDAError
from uda.losses import log_mean_probs
from uda.nn import full, no_autocast
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter, Method
from uda_testtime.checks import check_head
from uda_testtime.parts import all_parameters
from uda_testtime.views import uniform


def crop_view(
    x: Tensor, generator: Generator, area: tuple[float, float] = (0.2, 1.0), ratio: float = 4 / 3, flip: bool = True
) -> Tensor:
    """Each image's own random crop at the old size, and mirror.

    Args:
        x: pixels ``[B, C, H, W]``; generator: on the CPU; area: bounds of the share that is kept.
        ratio: largest stretch of the crop's sides; flip: mirror half of the images.
    """

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    size, stretch = draw(*area).sqrt(), draw(-math.log(ratio) / 2, math.log(ratio) / 2).exp()
    w, h = (size * stretch).clamp_max(1), (size / stretch).clamp_max(1)
    left, top = draw(-1, 1) * (1 - w), draw(-1, 1) * (1 - h)
    sign = 1 - 2 * (draw(0, 1) < 0.5).float() * flip
    zero = torch.zeros_like(w)
    theta = torch.stack([torch.stack([w * sign, zero, left], 1), torch.stack([zero, h, top], 1)], 1).to(x)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def strong_view(x: Tensor, generator: Generator, flip: bool = True) -> Tensor:
    """MoCo v2's views: crop, brightness, contrast and saturation of 0.4, hue of 0.1 (0.8), grey (0.2), blur (0.5).

    Crop, colour and grey are drawn for each image, hue and blur once for the batch.

    Args:
        x: pixels ``[B, 1 or 3, H, W]`` in [0, 1]; generator: on the CPU.
    """

    def each(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(len(x), 1, 1, 1, generator=generator)).to(x)

    y = crop_view(x.clamp(0, 1), generator, flip=flip)
    z = (y * each(0.6, 1.4)).clamp(0, 1)
    grey = T.rgb_to_grayscale(z) if x.shape[1] == 3 else z
    z = torch.lerp(grey.mean((1, 2, 3), keepdim=True).expand_as(z), z, each(0.6, 1.4)).clamp(0, 1)
    if x.shape[1] == 3:
        z = torch.lerp(T.rgb_to_grayscale(z).expand_as(z), z, each(0.6, 1.4)).clamp(0, 1)
        z = T.adjust_hue(z, uniform(-0.1, 0.1, generator))
    y = torch.where(each(0, 1) < 0.8, z, y)
    if x.shape[1] == 3:
        y = torch.where(each(0, 1) < 0.2, T.rgb_to_grayscale(y).expand_as(y), y)
    side = max(3, min(x.shape[-2:]) // 10 // 2 * 2 + 1)
    sigma = uniform(0.1, 2.0, generator)
    return y if uniform(0, 1, generator) < 0.5 else T.gaussian_blur(y, [side, side], [sigma, sigma])


@torch.no_grad()
def neighbour_labels(features: Tensor, bank: Tensor, probs: Tensor, k: int) -> Tensor:
    """Class ``[B]`` of the mean prediction of the ``k`` nearest by cosine (AdaContrast, eq. 2).

    Args:
        features: ``[B, D]``; bank: ``[M, D]``; probs: of the bank's samples ``[M, C]``.
    """
    cosine = F.normalize(features, dim=1) @ F.normalize(bank, dim=1).T
    return probs[cosine.topk(min(k, len(bank)), 1).indices].mean(1).argmax(1)


def instance_contrast(
    query: Tensor, key: Tensor, queue: Tensor, labels: Tensor, queued: Tensor, temperature: float = 0.07
) -> Tensor:
    """InfoNCE without negatives of the own pseudo-class (AdaContrast, eq. 5).

    Args:
        query, key: ``[B, D]``, of unit length; queue: earlier keys ``[M, D]``.
        labels, queued: pseudo-labels ``[B]`` and of the queue ``[M]``.
    """
    own = (query * key).sum(1, keepdim=True)
    others = (query @ queue.T).masked_fill(labels[:, None] == queued, -torch.inf)
    return -(torch.cat([own, others], 1) / temperature).log_softmax(1)[:, 0].mean()


@contextmanager
def moving_statistics(net: nn.Module, on: bool) -> Iterator[None]:
    """Inside, BatchNorm layers use the batch's statistics and move their own; all else stays in evaluation mode."""
    layers = [m for m in net.modules() if isinstance(m, _BatchNorm)] if on else []
    try:
        for m in layers:
            m.train()
        yield
    finally:
        for m in layers:
            m.eval()


class AdaContrast(Method):
    """Contrastive test-time adaptation, online (Chen et al., CVPR 2022).

    ``L = self_training * CE(strong, label) + contrast * L_ins + diversity * sum_c p_c log p_c``, all parameters
    trained. Scored: the logits of the plain samples **after** the update.

    Args:
        lr: learning rate of SGD (momentum 0.9, Nesterov, weight decay 1e-4) or ``optimizer``.
        head_factor: of the classifier's rate (10 on DomainNet-126).
        self_training, contrast, diversity: of the terms.
        momentum: of the key network; temperature: of the contrast; queue: length of queue and bank.
        neighbours: whose mean prediction labels a sample, once ``refine_after`` samples were seen; before, the net.
        statistics: of BatchNorm: ``moving`` follows the stream, as in the authors' code, and gives another prediction
            than the source model's even with ``lr=0``; ``source``.
        flip: views may be mirrored.
    """

    scored = "after the update"

    def __init__(
        self, lr: float = 2e-4, optimizer: str = "sgd", head_factor: float = 1.0, self_training: float = 1.0,
        contrast: float = 1.0, diversity: float = 1.0, momentum: float = 0.999, temperature: float = 0.07,
        queue: int = 16384, neighbours: int = 10, refine_after: int = 1024,
        statistics: Literal["moving", "source"] = "moving", flip: bool = True,
    ) -> None:  # fmt: skip
        if statistics not in ("moving", "source"):
            raise UDAError(f"AdaContrast: statistics is 'moving' or 'source', not {statistics!r}.")
        self.lr, self.optimizer, self.head_factor, self.flip = lr, optimizer, head_factor, flip
        self.self_training, self.contrast, self.diversity = self_training, contrast, diversity
        self.momentum, self.temperature, self.queue = momentum, temperature, queue
        self.neighbours, self.refine_after, self.statistics = neighbours, refine_after, statistics

    def attach(self, a: Adapter) -> None:
        """The key network, and an optimiser with a group for the classifier."""
        a.add("key", EMATeacher(a.net, buffers="none"))
        every = all_parameters(a, "AdaContrast")
        head = list(a.net.get_submodule(check_head(a.head, "AdaContrast")).parameters())
        rest = [p for p in every if not any(p is q for q in head)]
        groups = [{"params": rest, "lr": self.lr}, {"params": head, "lr": self.lr * self.head_factor}]
        options: dict[str, Any] = {"nesterov": True, "weight_decay": 1e-4} if self.optimizer == "sgd" else {}
        a.train_parameters([g for g in groups if g["params"]], self.optimizer, self.lr, **options)

    def _push(self, a: Adapter, name: str, value: Tensor) -> None:
        old = a.state.get(name)
        a.state[name] = (value if old is None else torch.cat([old, value]))[-self.queue :].clone()

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Views, labels, one step, and the logits after it."""
        rows, moving, state = x.dim() == 2, self.statistics == "moving" and len(x) > 1, a.state
        weak = x if rows else a.view(x, partial(crop_view, area=(0.875**2, 0.875**2), ratio=1.0, flip=self.flip))
        make = None if rows else partial(strong_view, flip=self.flip)
        query, other, key = a.view(x, make), a.view(x, make), a.extra["key"]
        with moving_statistics(a.net, moving), moving_statistics(key, moving):
            with torch.no_grad():
                feature, logits = a.features(weak)
                label = logits.argmax(1)
                if state.get("seen", 0) >= self.refine_after and "bank" in state:
                    label = neighbour_labels(full(feature).flatten(1), state["bank"], state["probs"], self.neighbours)
                key.update(a.net, self.momentum)
                k = F.normalize(full(a.features(other, key.copies[0])[0]).flatten(1), dim=1)
                bank, bank_logits = a.features(weak, key.copies[0])
            q, z = a.features(query)
            with no_autocast(z):
                q, log_p = F.normalize(full(q).flatten(1), dim=1), log_mean_probs(z)
                queue, queued = state.get("queue", k[:0]), state.get("labels", label[:0])
                loss = self.self_training * F.cross_entropy(full(z), label)
                loss = loss + self.contrast * instance_contrast(q, k, queue, label, queued, self.temperature)
                loss = loss + self.diversity * (log_p.exp() * log_p).sum()
            a.update(loss)
        for name, value in (  # after the loss: a label belongs to the key beside it
            ("queue", k), ("labels", label), ("bank", full(bank).flatten(1)), ("probs", full(bank_logits).softmax(1)),
        ):  # fmt: skip
            self._push(a, name, value)
        state["seen"] = state.get("seen", 0) + len(x)
        with torch.no_grad():
            return a.net(x)
