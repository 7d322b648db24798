"""Self-supervised side tasks on both domains (Bucci et al., TPAMI 2021): what rotation and jigsaw have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.losses import classification_loss


class SideTask(uda.Plugin, ABC):
    """Base of tasks "which of P changes was made to this image?", trained on source and target alike.

    Both domains share the task's head, and need no class label for it, so that the features learn what serves the task
    in both. A subclass gives the number of changes and makes them. The classifier sees the images unchanged; the
    changed ones are a forward of their own (one for all domains with ``model.forward_mode: joint``).

    Args:
        source_weight: of the source's objective, a mean over the sources.
        target_weight: of the target's objective.
        untouched: share of the images that stay as they are (label 0); None: all labels equally often.
        lr_scale: learning rate of the head relative to the other new layers.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {
        "source_weight": (0.1, 1.0, "log"), "target_weight": (0.1, 1.0, "log"),
    }  # fmt: skip
    #: name of the task in logs and errors
    task: ClassVar[str] = ""

    def __init__(self, source_weight: float, target_weight: float, untouched: float | None, lr_scale: float) -> None:
        super().__init__()
        name = type(self).__name__
        if min(source_weight, target_weight) < 0 or source_weight + target_weight == 0:
            raise uda.UDAError(f"{name}: weights must not be negative, nor both be 0.")
        if untouched is not None and not 0 <= untouched < 1:
            raise uda.UDAError(f"{name}: untouched is a share in [0, 1), not {untouched}.")
        self.source_weight, self.target_weight, self.untouched = source_weight, target_weight, untouched
        self.lr_scale = lr_scale
        self.head: nn.Linear | None = None

    # ------------------------------------------------------------------------------- what a subclass gives

    @abstractmethod
    def num_labels(self) -> int:
        """Changes that the head tells apart, label 0 (no change) included."""

    @abstractmethod
    def change(self, x: Tensor, label: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` changed as their labels ``[B]`` say, in the same shape."""

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Raise a :class:`uda.UDAError` for images of a shape (C, H, W) that cannot be changed in this way."""

    # --------------------------------------------------------------------------------------------- hooks

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The task's head, on the features that the classifier has."""
        shape = tuple(model.input_shape)
        if len(shape) != 3:
            raise uda.UDAError(
                f"{type(self).__name__} changes images [C, H, W], and the inputs of this run have the shape "
                f"{list(shape)}: feature rows have no such task. Leave the plugin out, or train on images."
            )
        self.check_shape(shape)
        if self.head is None:
            self.head = nn.Linear(model.feature_dim, self.num_labels())

    @uda.hookimpl
    def param_groups(self) -> list[dict[str, Any]]:
        """The head at its own rate."""
        return [{"params": list(self.head.parameters()), "lr_scale": self.lr_scale}]

    def draw(self, x: Tensor) -> Tensor:
        """Labels ``[B]``."""
        labels, size = self.num_labels(), len(x)
        if self.untouched is None:
            return torch.randint(labels, (size,), device=x.device)
        changed = torch.rand(size, device=x.device) >= self.untouched
        return torch.randint(1, labels, (size,), device=x.device) * changed

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The task's cross-entropy on the sources and on the target."""
        batches = [*step.sources.values()] if self.source_weight else []
        if self.target_weight:
            batches.append(step.target)
        labels = [self.draw(b.x) for b in batches]
        changed = [
            uda.DomainBatch(step.model, b.name, b.role, {"x": self.change(b.x, y), "index": b.index}, step)
            for b, y in zip(batches, labels, strict=True)
        ]
        if step.model.joint_forward:
            step.model.compute_features(changed, "x")
        losses, right = {}, {}
        for i, (b, y) in enumerate(zip(changed, labels, strict=True)):
            logits = self.head(b.features)
            losses[i, b.role] = classification_loss(logits, y)
            right[f"accuracy_{b.role}"] = lambda z=logits, y=y: (z.argmax(1) == y).float().mean()
        self.log_later(**right)
        source = {str(k): v for k, v in losses.items() if k[1] == "source"}
        out = {"source": self.source_weight * step.domain_mean(source)} if source else {}
        target = [v for k, v in losses.items() if k[1] == "target"]
        return out | ({"target": self.target_weight * target[0]} if target else {})
