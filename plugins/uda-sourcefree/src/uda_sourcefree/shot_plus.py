"""SHOT++: relative rotations, and a second step that learns from sure samples (Liang et al., TPAMI 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.images import rotate
from uda.losses import class_distributions, classification_loss, entropy
from uda.nn import full
from uda.pseudo import mean_of_kept
from uda_sourcefree.mixing import mixed
from uda_sourcefree.shot import SHOT


@torch.no_grad()
def sure_share(labels: Tensor, uncertainty: Tensor, share: float = 0.5) -> Tensor:
    """Mask ``[N]`` of the samples whose entropy is among the smallest ``share`` of their predicted class.

    Args:
        labels: predicted classes ``[N]``; uncertainty: entropy of the predictions ``[N]``.
    """
    order = torch.argsort(uncertainty, stable=True)
    order = order[torch.argsort(labels[order], stable=True)]  # by class, and by entropy in each
    counts = torch.bincount(labels)
    start = (counts.cumsum(0) - counts)[labels[order]]
    rank = torch.arange(len(labels), device=labels.device) - start
    mask = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    mask[order] = rank < (share * counts[labels[order]]).ceil()
    return mask


def sharpened(probs: Tensor, temperature: float) -> Tensor:
    """``p^(1/T)``, normalised, ``[B, C]``."""
    p = probs.clamp(min=1e-12).pow(1 / temperature)
    return p / p.sum(1, keepdim=True)


class SHOTPlusPlus(SHOT):
    """SHOT with relative rotations; then sure samples are labelled, and teach the others as in MixMatch.

    First step, up to ``second_step`` of the run: the objectives of SHOT, and
    ``rotation * CE(q([f(x), f(turn_r x)]), r)`` with a linear head ``q`` on the features of an image, as constants, and
    of its rotation by r quarters. Second step: the target is split once, in each predicted class by entropy
    (:func:`sure_share`). Sure samples keep their label; the others get the sharpened mean prediction of two views; all
    are mixed with random partners, and ``CE + unsure_weight * ramp * mean (p - y)^2`` is over the sure and the unsure
    rows of the batch. The classifier stays frozen. The authors' code trains the rotation head before the first step,
    and starts the second with a new optimiser and a new classifier, on batches of as many sure as unsure samples; here
    both go on in one run, jointly.

    Args:
        label_weight, entropy_weight, diversity, threshold, rounds: of SHOT.
        rotation: weight of the rotations; 0 where inputs are no square images.
        second_step: share of the run after which the second step starts; 1: never.
        share: of each predicted class that is sure; None: the share of the target whose entropy is below its mean, as
            in the authors' code.
        temperature: of the sharpening; mixing: a of Beta(a, a).
        unsure_weight: of the unsure samples; its ramp is linear over the second step. 100 in the authors' code.
    """

    settings = ("closed", "source-free")
    search_space: ClassVar[dict[str, Any]] = {**SHOT.search_space, "second_step": [0.5, 0.75, 1.0]}
    reruns_backbone = True
    sure: Tensor
    started: Tensor

    def __init__(
        self,
        label_weight: float = 0.3,
        entropy_weight: float = 1.0,
        diversity: bool = True,
        threshold: int = 0,
        rounds: int = 2,
        rotation: float = 0.6,
        second_step: float = 0.5,
        share: float | None = None,
        temperature: float = 0.5,
        mixing: float = 0.75,
        unsure_weight: float = 100.0,
    ) -> None:
        super().__init__(label_weight, entropy_weight, diversity, threshold, rounds)
        if min(rotation, unsure_weight) < 0 or not 0 <= second_step <= 1 or not (share is None or 0 < share < 1):
            raise uda.UDAError("SHOTPlusPlus: weights not negative, second_step in [0, 1], share between 0 and 1.")
        if temperature <= 0 or mixing <= 0:
            raise uda.UDAError("SHOTPlusPlus: temperature and mixing must be above 0.")
        self.rotation, self.second_step, self.share = rotation, second_step, share
        self.temperature, self.mixing, self.unsure_weight = temperature, mixing, unsure_weight
        self.turns: nn.Linear | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone, with a second view, whole at the start of each epoch."""
        return uda.DataNeeds(source=False, refresh={"target"}, views={"weak"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """As SHOT; the rotation head and the split.

        Raises:
            UDAError: rotations of inputs that are no square images.
        """
        super().build(model)
        shape = model.input_shape
        if self.rotation and shape is not None and (len(shape) != 3 or shape[1] != shape[2]):
            raise uda.UDAError(f"SHOTPlusPlus: inputs of shape {list(shape)} cannot be turned. Set rotation: 0.")
        if self.rotation and self.turns is None:
            self.turns = nn.Linear(2 * model.feature_dim, 4)
        if "sure" not in self._buffers:
            self.register_buffer("sure", torch.zeros(len(self.labels), dtype=torch.bool))
            self.register_buffer("started", torch.zeros((), dtype=torch.bool))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """First step: labels by the centroids. At the start of the second: labels and split, for good."""
        if bool(self.started):
            return
        if model.progress < self.second_step:
            return super().refresh(model, bank)
        logits = full(bank.target.logits)
        self.labels.copy_(logits.argmax(1))
        uncertainty = entropy(logits)
        share = self.share or float((uncertainty < uncertainty.mean()).float().mean())
        self.sure.copy_(sure_share(self.labels, uncertainty, share))
        self.started.fill_(True)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """SHOT's objectives and rotations, or those of the second step."""
        if bool(self.started):
            return self._second(step)
        out = super().refine_classifier(step)
        if self.rotation:
            target = step.target
            turns = torch.randint(4, (len(target),), device=target.x.device)
            turned = step.model.batch(rotate(target.x, turns)).features
            logits = self.turns(torch.cat([target.features.detach(), turned], 1))
            out["rotation"] = self.rotation * classification_loss(logits, turns)
        return out

    def _second(self, step: uda.Step) -> dict[str, Tensor]:
        target, model = step.target, step.model
        sure = self.sure[target.index]
        with torch.no_grad():
            views = [full(target.logits).softmax(1), full(target.view("weak").logits).softmax(1)]
            guess = sharpened(sum(views) / 2, self.temperature)
            known = class_distributions(self.labels[target.index], guess.shape[1], guess.dtype)
            y = torch.where(sure[:, None], known, guess)
        x, y = mixed(target.x, y, self.mixing)
        logits = model.batch(x).logits
        gap = (full(logits).softmax(1) - y).square().mean(1)
        ramp = min(1.0, (step.progress - self.second_step) / max(1 - self.second_step, 1e-8))
        loss = classification_loss(logits, y, reduction="none")
        idle = sum(0 * p.sum() for p in self.parameters())  # several processes wait for each parameter's gradient
        return {
            "sure": idle + mean_of_kept(loss, sure),
            "unsure": self.unsure_weight * ramp * mean_of_kept(gap, ~sure),
        }
