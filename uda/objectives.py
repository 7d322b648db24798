"""The objectives of a step: by all hooks, their weighed sum, and once more at other weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from uda import running
from uda.errors import UDAError
from uda.gate import Objectives
from uda.losses import classification_loss, multi_label_loss
from uda.step import DomainBatch, Step

if TYPE_CHECKING:
    from uda.module import UDA


def prepare(model: UDA, step: Step) -> None:
    """Call ``prepare_batch``; a method that steps by hand may want the batch as it is now once more."""
    model.hooks.all("prepare_batch", step=step)
    if not model.automatic_optimization:
        step.prepared = _left(step)


def collect(model: UDA, step: Step) -> None:
    """Fill ``step.objectives``: classification of sources and labelled target rows, then align, pseudo-label, refine.

    Raises:
        UDAError: where there is none.
    """
    objectives = step.objectives
    if step.sources:
        loss_of = multi_label_loss if model.multi_label else classification_loss
        losses = {
            n: loss_of(b.logits, b.y, model.label_smoothing, b.weight) for n, b in step.sources.items()
        }
        objectives["classification"] = step.domain_mean(losses)
    if (few := step.labelled) is not None:
        objectives["labelled_target"] = classification_loss(few.logits, few.y, model.label_smoothing)
    for hook in ("align_features", "refine_classifier"):
        if hook == "refine_classifier" and step.target is not None:
            _, step.target.pseudo = model.hooks.first("pseudo_label", step=step)
        for key, found in model.hooks.each(hook, step=step):
            objectives.update(running.named(key, hook, found))
    if not objectives:
        raise UDAError("No objective in this step: a source-free run needs a plugin that returns one.")


def total(model: UDA, step: Step) -> Tensor:
    """Sum of the objectives, weighed by the first plugin that weighs them."""
    if model.hooks.filled("weigh_objectives"):
        objectives = Objectives(step.objectives, step)
        _, weights = model.hooks.first("weigh_objectives", step=step, objectives=objectives)
        if weights is not None:
            running.log_weights(model, weights)
            return objectives.combine(weights)
    first, *others = (x.float() for x in step.objectives.values())
    return sum(others, start=first)


def again(step: Step) -> Step:
    """The batch of a step as ``prepare_batch`` left it, with nothing computed yet."""

    def inputs(batch: DomainBatch) -> dict[str, Any]:
        extra = {"y": batch.y, "index": batch.index}
        return {n: v.x for n, v in batch.views.items()} | {k: v for k, v in extra.items() if v is not None}

    data: dict[str, Any] = {"sources": {n: inputs(b) for n, b in step.sources.items()}}
    data |= {r: inputs(getattr(step, r)) for r in ("target", "held_out", "labelled") if getattr(step, r) is not None}
    fresh = Step(step.model, data, step.progress, step.batch_idx, step.index)
    for name, batch in step.sources.items():
        fresh.sources[name].weight = batch.weight
    if (prepared := getattr(step, "prepared", None)) is not None:
        caches, given = prepared
        for mine, kept in zip(_owners(fresh), caches, strict=True):
            mine.cache.update(kept)
        for number, name, features, logits in given:
            view = _owners(fresh)[number].views[name]
            view.features = features
            if logits is not None:
                view.set_logits(logits)
        fresh.prepared = prepared
    return fresh


def _owners(step: Step) -> list[Any]:
    return [step, *step.sources.values(), *(b for b in (step.target, step.held_out, step.labelled) if b is not None)]


def _left(step: Step) -> tuple[list[dict[str, Any]], list[tuple[int, str, Tensor, Tensor | None]]]:
    """What plugins left on the step and its batches for later hooks: caches, and features that are constants.

    Intermediates of a forward come after this, and features with a gradient belong to the weights of now.
    """
    given = [
        (number, name, view._features, None if view._logits is None else view._logits.detach())
        for number, owner in enumerate(_owners(step))
        for name, view in getattr(owner, "views", {}).items()
        if view.computed and not view._features.requires_grad
    ]
    return [dict(owner.cache) for owner in _owners(step)], given
