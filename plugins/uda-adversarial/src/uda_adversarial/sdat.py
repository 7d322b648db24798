"""Smooth Domain Adversarial Training (Rangwani et al., ICML 2022)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.hooks import hooks_of
from uda.ranks import mean_over_ranks


def ascent(grads: Sequence[Tensor], rho: float) -> list[Tensor]:
    """``rho g / |g|``, the norm over all tensors: to first order the worst step of length rho (Foret et al. 2021)."""
    norm = torch.stack([g.detach().float().norm() for g in grads]).norm()
    return [g.detach() * (rho / norm.clamp_min(1e-12)).to(g.dtype) for g in grads]


@contextmanager
def moved(model: nn.Module, parameters: Sequence[nn.Parameter], offsets: Sequence[Tensor]) -> Iterator[None]:
    """Let every module of ``model`` compute with ``p + offset`` in the place of each parameter p.

    The parameters themselves stay as they are, and what is computed inside has its gradient on them: the one at the
    moved weights. So nothing has to be put back, in any precision, and no rounding error is left behind.
    """
    elsewhere = {id(p): p + o for p, o in zip(parameters, offsets, strict=True)}
    replaced = []
    for module in model.modules():
        for name, p in module._parameters.items():
            if id(p) in elsewhere:
                replaced.append((module, name, p))
    for module, name, p in replaced:
        module._parameters[name] = elsewhere[id(p)]
    try:
        yield
    finally:
        for module, name, p in replaced:
            module._parameters[name] = p


class SDAT(uda.Plugin):
    """All objectives at weights where the *task* loss is worst nearby: smooth minima of the task, whatever the aligner.

    With ``e = rho g / |g|``, ``g`` the task loss's gradient on backbone, bottleneck and head, the optimiser steps with
    the gradient of all objectives at ``w + e`` (Rangwani et al. 2022). The task loss is the classification and what
    refines it; aligners have no part in ``e``, and their own networks are not moved. An addition to DANN, CDAN, MCC or
    any other method: two forwards and backwards a step, by hand, so that clipping and accumulation are
    ``model.manual_clip`` and ``model.manual_accumulate``. Normalisation statistics see each batch twice.

    Args:
        rho: length of the step e (published: 0.02 on Office-Home and with MCC on VisDA, 0.005 for CDAN on VisDA).
        task: what makes up the task loss: names of objectives (``classification``, ``refine/confusion``) or keys of
            plugins. None: the classification and all objectives of plugins that do not align features.
    """

    settings = ("closed", "multi-source")
    manual = True
    search_space: ClassVar[dict[str, Any]] = {"rho": (0.005, 0.2, "log")}

    def __init__(self, rho: float = 0.02, task: list[str] | None = None) -> None:
        super().__init__()
        if rho < 0 or (task is not None and not task):
            raise uda.UDAError("SDAT: rho must not be negative, and task names at least one objective.")
        self.rho, self.task = rho, None if task is None else list(task)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Refuse tasks that no plugin can have."""
        known = {"classification", *model.plugins.keys()}
        for name in self.task or ():
            if name.split("/")[0] not in known:
                raise uda.UDAError(f"SDAT: no objective {name!r} for its task. There are {', '.join(sorted(known))}.")

    def task_loss(self, step: uda.Step) -> Tensor | None:
        """Sum of the objectives whose sharpness counts; None where the step has none that trains anything.

        Raises:
            UDAError: where the argument ``task`` names none of the step's objectives.
        """
        plugins = step.model.plugins

        def counts(name: str) -> bool:
            key = name.split("/")[0]
            if self.task is not None:
                return name in self.task or key in self.task
            return key not in plugins or "align_features" not in hooks_of(type(plugins[key]))

        found = [v.float() for k, v in step.objectives.items() if counts(k)]
        if not found and self.task is not None:
            raise uda.UDAError(
                f"SDAT: none of this step's objectives ({', '.join(step.objectives)}) belongs to the task: "
                "name those that do in its argument 'task'."
            )
        trains = [v for v in found if v.requires_grad]
        return sum(trains[1:], start=trains[0]) if trains else None

    @uda.hookimpl
    def optimise(self, step: uda.Step, objectives: uda.Objectives) -> bool:
        """Find the worst weights nearby, and step with the gradient that is there."""
        model, task = step.model, self.task_loss(step)
        if task is None:
            model.manual_update(model.total(step))
            return True
        parts = (model.backbone, model.bottleneck, model.head)
        parameters = list({id(p): p for m in parts for p in m.parameters() if p.requires_grad}.values())
        grads = mean_over_ranks(torch.autograd.grad(task, parameters, allow_unused=True, materialize_grads=True))
        with moved(model, parameters, ascent(grads, self.rho)):
            again = model.again(step)
            total = model.total(again)
        self.log_later(sharpness=self.task_loss(again).detach() - task.detach())
        model.manual_update(total)
        return True
