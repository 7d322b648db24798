"""Pseudo-labels by confidence, and training on pseudo-labels (Lee, ICML workshop 2013; Zou et al., ECCV 2018)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.nn import full, no_autocast
from uda.nn import ramp as ramp_factor
from uda.pseudo import pseudo_cross_entropy

VIEWS = ("x", "weak", "strong")


def confident_labels(logits: Tensor, threshold: float, soft: bool = False) -> uda.PseudoLabels:
    """The most likely class of each sample; kept where its probability is above ``threshold``.

    Args:
        logits: ``[B, C]``.
        threshold: in [0, 1); 0 keeps all.
        soft: give the class probabilities as labels, too.
    """
    with no_autocast(logits):
        probs = full(logits.detach()).softmax(1)
        confidence, y = probs.max(1)
    return uda.PseudoLabels(y, soft=probs if soft else None, keep=confidence > threshold)


def most_confident_of_each_class(confidence: Tensor, y: Tensor, share: float) -> Tensor:
    """Mask ``[N]`` of the ``ceil(share * n_c)`` most confident of the ``n_c`` samples labelled c, for each c.

    The class-balanced selection of CBST (Zou et al. 2018): a threshold for each class,
    so that classes that are hard to be sure of are not lost.

    Args:
        confidence: ``[N]``; y: class ids ``[N]``; share: in (0, 1].
    """
    order = torch.argsort(confidence, descending=True, stable=True)
    order = order[torch.argsort(y[order], stable=True)]  # by class, and within a class by confidence
    counts = torch.bincount(y)
    place = torch.arange(len(y), device=y.device) - (counts.cumsum(0) - counts)[y[order]]
    allowed = (share * counts.double() - 1e-9).ceil().clamp_min(1)
    keep = torch.zeros_like(y, dtype=torch.bool)
    keep[order] = place < allowed[y[order]]
    return keep


class PseudoLabel(uda.Plugin):
    """Label the target batch by the classifier's own sure predictions; what trains on the labels is another plugin.

    ``y = argmax_c p_c``, kept where ``max_c p_c > threshold`` (Lee 2013; Sohn et al. 2020), and where the sample is
    among the ``share`` most confident ones that the whole target has of its class (CBST: Zou et al. 2018).

    Args:
        threshold: smallest probability of a label that is kept (0: all).
        update: ``step``: label each batch as the model sees it now; ``epoch``: label the whole target at the start of
            each epoch, in evaluation mode, and keep these labels for the epoch.
        share: part of each class that is kept, for ``update: epoch``; 1 leaves it to the threshold.
        share_start: share at the start of the run; it grows linearly to ``share``. None: ``share`` throughout. (Zou
            et al. start at 0.2, add 0.05 a round, and stop at 0.5.)
        warmup: share of the run in which no label is kept: an untrained classifier labels at random, and what is
            trained on such labels stays wrong.
        view: the view that is labelled, for ``update: step``: ``x``, ``weak`` or ``strong``.
        soft: give class probabilities as labels, not one class.
    """

    settings = ("closed", "partial", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"threshold": [0.0, 0.5, 0.8, 0.9, 0.95], "update": ["step", "epoch"]}

    def __init__(
        self,
        threshold: float = 0.9,
        update: str = "step",
        share: float = 1.0,
        share_start: float | None = None,
        warmup: float = 0.1,
        view: str = "x",
        soft: bool = False,
    ) -> None:
        super().__init__()
        check_choice("PseudoLabel", "view", view, VIEWS)
        if not (0 <= threshold < 1 and 0 <= warmup < 1):
            raise uda.UDAError(f"PseudoLabel: threshold and warmup are in [0, 1), not {threshold} and {warmup}.")
        check_choice("PseudoLabel", "update", update, ("step", "epoch"))
        start = share if share_start is None else share_start
        if not (0 < share <= 1 and 0 < start <= 1):
            raise uda.UDAError(f"PseudoLabel: share and share_start are in (0, 1], not {share} and {start}.")
        if update == "step" and min(share, start) < 1:
            raise uda.UDAError("PseudoLabel: a share of each class is taken of the whole target: set update: epoch.")
        if update == "epoch" and view != "x":
            raise uda.UDAError("PseudoLabel: the whole target is labelled without augmentation: leave view at x.")
        self.threshold, self.update, self.view, self.soft = threshold, update, view, soft
        self.share, self.share_start, self.warmup = share, start, warmup

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The view that is labelled, or the whole target at each epoch's start."""
        if self.update == "epoch":
            return uda.DataNeeds(refresh={"target"})
        return uda.DataNeeds(views={self.view} - {"x"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """A label for each sample of the target's training pool."""
        if self.update == "step" or "labels" in self._buffers:
            return
        size = model.sizes.get(model.target_name)
        if size is None:
            raise uda.UDAError("PseudoLabel: update: epoch needs the size of the target (fit with a uda.DataModule).")
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("kept", torch.zeros(size, dtype=torch.bool))
        if self.soft:
            self.register_buffer("probs", torch.zeros(size, model.num_classes))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Label the whole target."""
        if self.update == "step":
            return
        found = confident_labels(bank.target.logits, self.threshold, soft=True)
        share = self.share_start + (self.share - self.share_start) * model.progress
        self.labels.copy_(found.y)
        self.kept.copy_(found.keep & most_confident_of_each_class(found.soft.max(1).values, found.y, share))
        if self.soft:
            self.probs.copy_(found.soft)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """Labels of this batch."""
        if self.update == "step":
            with torch.no_grad():
                found = confident_labels(step.target.view(self.view).logits, self.threshold, self.soft)
        else:
            at = step.target.index
            found = uda.PseudoLabels(self.labels[at], soft=self.probs[at] if self.soft else None, keep=self.kept[at])
        if step.progress < self.warmup:
            found.keep = torch.zeros_like(found.keep)
        self.log_later(kept=lambda: found.keep.float().mean())
        return found


class SelfTraining(uda.Plugin):
    """Cross-entropy of the target on its pseudo-labels, whichever plugin gave them; see
    :func:`~uda.pseudo.pseudo_cross_entropy`.

    Args:
        weight: of the objective.
        view: the view that is trained: ``x``, ``weak`` or ``strong``. Labels of an untouched view and training on
            ``strong`` is FixMatch.
        mean: over the ``batch`` (samples that are not kept count as zero) or over the ``kept``.
        ramp: growth of the weight over the run's progress: ``none``, ``linear``, ``warm_start``.
    """

    settings = ("closed", "partial", "multi-source", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 3.0, "log"), "ramp": ["none", "linear"]}

    def __init__(self, weight: float = 1.0, view: str = "x", mean: str = "batch", ramp: str = "none") -> None:
        super().__init__()
        check_choice("SelfTraining", "view", view, VIEWS)
        if weight < 0:
            raise uda.UDAError("SelfTraining: weight must not be negative.")
        check_choice("SelfTraining", "mean", mean, ("batch", "kept"))
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.view, self.mean, self.ramp = weight, view, mean, ramp

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The view that is trained."""
        return uda.DataNeeds(views={self.view} - {"x"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Refuse to start without a plugin that labels."""
        if not model.hooks.filled("pseudo_label"):
            raise uda.UDAError(
                f"SelfTraining (plugin {self.key!r}) trains on pseudo-labels, and no plugin gives any: add one that "
                "does, such as PseudoLabel."
            )

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The objective; nothing in a step without pseudo-labels."""
        pseudo = step.target.pseudo
        if pseudo is None:
            return {}
        loss = pseudo_cross_entropy(step.target.view(self.view).logits, pseudo, self.mean)
        return {"self_training": self.weight * ramp_factor(self.ramp, step.progress) * loss}
