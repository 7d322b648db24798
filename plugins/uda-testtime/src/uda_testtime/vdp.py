"""VDP: prompts in the input, one for the present domain and one for all, before a frozen net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full
from uda.nn.ema import EMATeacher
from uda_testtime.adapter import Adapter, Method
from uda_testtime.layers import first_inputs
from uda_testtime.parts import colour_view, cross_entropy
from uda_testtime.surgery import mix_statistics


class Prompts(nn.Module):
    """Two prompts that are added to inputs, both zero at first, with what is known of the second's importance.

    Before a convolution each is a patch of ``size`` by ``size`` pixels at a place of its own, cut to smaller images;
    before a Linear each covers the whole sample.

    Args:
        image: whether the first layer is a convolution; inputs: its channels, or its inputs; size: of a patch.
        places: where the two patches lie ``[2, 2]``, as shares of the free height and width in [0, 1].

    Attributes:
        specific, agnostic: the prompts ``[inputs, size, size]`` or ``[inputs]``.
        importance, anchor, start, path: of the agnostic prompt: its weights in the penalty, its values at the end of
            the last domain, at the start of this one, and what its steps in this one have gained.
    """

    def __init__(self, image: bool, inputs: int, size: int, places: Tensor) -> None:
        super().__init__()
        self.image = image
        shape = (inputs, size, size) if image else (inputs,)
        self.specific, self.agnostic = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
        self.register_buffer("places", places)
        for name in ("importance", "anchor", "start", "path"):
            self.register_buffer(name, torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` with both prompts added.

        Raises:
            UDAError: samples whose sizes do not fit the net's first layer.
        """
        inputs = len(self.agnostic)
        if not self.image:
            if x[0].numel() != inputs:
                raise UDAError(f"VDP: the net's first layer takes {inputs} inputs, a sample has {tuple(x.shape[1:])}.")
            return x + (self.specific + self.agnostic).to(x.dtype).view(x.shape[1:])
        if x.dim() != 4 or x.shape[1] != inputs:
            raise UDAError(f"VDP: prompts need images [B, {inputs}, H, W], not {tuple(x.shape)}.")
        for prompt, place in ((self.specific, self.places[0]), (self.agnostic, self.places[1])):
            x = x + placed(prompt, place.tolist(), *x.shape[2:]).to(x.dtype)
        return x

    @torch.no_grad()
    def gained(self, gradient: Tensor, before: Tensor) -> None:
        """Add a step of the agnostic prompt, from ``before``, to its path: by how much the loss fell to first order."""
        self.path -= gradient * (self.agnostic - before)

    @torch.no_grad()
    def next_domain(self, damp: float) -> None:
        """The domain has changed: what its steps gained becomes importance, and the prompt's values the anchor."""
        self.importance += self.path.relu() / ((self.agnostic - self.start).square() + damp)
        self.anchor.copy_(self.agnostic)
        self.start.copy_(self.agnostic)
        self.path.zero_()


def placed(prompt: Tensor, place: list[float], height: int, width: int) -> Tensor:
    """A patch ``[C, s, s]`` in an image of zeros ``[C, H, W]``; ``place`` is its share of the free height and width."""
    h, w = min(prompt.shape[1], height), min(prompt.shape[2], width)
    top, left = round(place[0] * (height - h)), round(place[1] * (width - w))
    return F.pad(prompt[:, :h, :w], (left, width - left - w, top, height - top - h))


class VDP(Method):
    """Visual domain prompts for continual adaptation (Gan et al., AAAI 2023); no weight of the net changes.

    Prompts are learned from a teacher, the same net with averaged prompts, on augmented views. The domain-specific
    prompt follows freely; the domain-agnostic one is held where its values mattered in earlier domains. Scored: the
    logits on the decorated inputs, before the update. With ``lr=0`` that is :class:`~uda_testtime.BNStatistics` of
    ``source_weight``.

    Args:
        lr: learning rate; optimizer: ``adam`` or ``sgd``; weight: of the loss.
        size: side of a patch in pixels; it lies at a place that the seed draws.
        momentum: of the teacher's prompts; views: over which its logits are averaged, 1 or more.
        homeostasis: weight of the penalty; damp: of its importances.
        threshold: change of the mean confidence between two batches by which a new domain is noticed.
        flip: views may be mirrored.
        source_weight: share of the source's BatchNorm statistics. None is 0, but 1 where the first layer is a Linear,
            after which the batch's mean would take away what a prompt adds to all samples alike.
    """

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, size: int = 16, momentum: float = 0.999,
        views: int = 4, homeostasis: float = 1.0, damp: float = 1e-3, threshold: float = 0.1, flip: bool = True,
        source_weight: float | None = None,
    ) -> None:  # fmt: skip
        if size < 1 or damp <= 0 or threshold < 0:
            raise UDAError(f"VDP: size={size} is not below 1, damp={damp} above 0, threshold={threshold} not below 0.")
        if views < 1:
            raise UDAError("VDP: views=0 learns nothing: on the same inputs the teacher agrees with the net.")
        self.lr, self.optimizer, self.weight, self.size = lr, optimizer, weight, size
        self.momentum, self.views, self.flip, self.source_weight = momentum, views, flip, source_weight
        self.homeostasis, self.damp, self.threshold = homeostasis, damp, threshold

    def attach(self, a: Adapter) -> None:
        """Batch statistics, prompts and their teacher."""
        image, inputs = first_inputs(a.net)
        mix_statistics(a, (0.0 if image else 1.0) if self.source_weight is None else self.source_weight)
        like = next(a.net.parameters())
        prompts = Prompts(image, inputs, self.size, torch.rand(2, 2, generator=a.generator)).to(like.dtype)
        a.add("prompts", prompts, trained=True)
        a.add("teacher", EMATeacher(prompts, buffers="none"))
        a.train_parameters([prompts.specific, prompts.agnostic], self.optimizer, self.lr)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits on decorated inputs."""
        return a.net(a.extra["prompts"](x))

    @torch.no_grad()
    def target(self, a: Adapter, x: Tensor) -> Tensor:
        """The teacher's logits ``[B, C]``."""
        teacher = a.extra["teacher"]
        return sum(a.net(teacher(colour_view(a, x, self.flip))) for _ in range(self.views)) / self.views

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, then one step of both prompts."""
        prompts, logits = a.extra["prompts"], self.predict(a, x)
        confidence = float(full(logits.detach()).softmax(1).max(1).values.mean())
        if abs(confidence - a.state.get("confidence", confidence)) > self.threshold:
            prompts.next_domain(self.damp)
        a.state["confidence"] = confidence
        a.backward(self.weight * cross_entropy(self.target(a, x), logits).mean())
        with torch.no_grad():
            held, before, gradient = prompts.agnostic, prompts.agnostic.clone(), prompts.agnostic.grad.clone()
            held.grad += 2 * self.homeostasis * prompts.importance * (held - prompts.anchor)
        a.optimizer_step()
        prompts.gained(gradient, before)
        a.extra["teacher"].update(prompts, self.momentum)
        return logits
