"""Pareto Domain Adaptation (Lv et al., NeurIPS 2021)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.nn import gather_rows
from uda_pareto.combiner import Vector, check_level, in_full, moving
from uda_pareto.mimic import ClassDomainNets, class_domain_loss, mimicking_loss, refine
from uda_pareto.preference import descent, guided


@contextmanager
def still_statistics(module: nn.Module) -> Iterator[None]:
    """BatchNorm layers normalise by the batch as in training, but their running statistics stay as they are."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for m in norms:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in norms:
            m.track_running_stats = True


class ParetoDA(uda.Plugin):
    """Weights that follow what would help the target, as far as no objective is harmed (Lv et al. 2021).

    Adds the target-classification-mimicking objective ``mimic`` (mutual information of sample and refined prediction)
    and ``class_domain``, which trains the class-wise domain nets of the refinement. In each step a linear program over
    the simplex finds the combination of all objectives' gradients that agrees best with the gradient of the mimicking
    loss on *held-out* unlabelled target samples, under the conditions of
    :func:`~uda_pareto.preference.guided`; where the held-out loss (zero at best) is below ``threshold``, the steepest
    common descent is taken (:func:`~uda_pareto.preference.descent`). Weights are K times the simplex weights of K
    objectives. Put an aligner such as DANN beside it.

    Args:
        level: where gradients are compared: ``bottleneck`` or ``parameters`` (of backbone and bottleneck; the paper,
            at the price of a backward through the backbone for each objective). None: ``parameters`` if
            ``model.gate_level`` says so, else ``bottleneck``. Features of held-out samples do not compare with those
            of other samples, so that there is no level ``features``.
        refinement: refine target predictions by the class-wise domain nets (False: an ablation of the paper).
        mimic_trains_head: let the mimicking loss train the classifier as well; in the published code only the source
            does, and the mimicking loss changes the features.
        threshold: held-out loss, in nats above its best value, from which on there is no preference any more.
        base: weight that every objective but the mimicking one has beside that of the program. The equations have 0,
            where a program whose solutions are corners of the simplex can leave source classification without any say
            on the features for long; the published code's update amounts to 1.
        hidden, layers, batch_norm: the class-wise domain nets, ``layers`` hidden layers of width ``hidden`` a class.
        lr_scale: learning rate of these nets relative to the head's.
        reference: behave as the published code where it departs from the equations: refinement by the raw logits;
            threshold on the negative mutual information, so that only common descent ever runs; weights (1, ..., 1)
            where its linear program fails; at least ``base: 1``; membership
            in the class-wise loss decided by the last sample alone; class-wise nets one domain at a time; BatchNorm
            statistics that see held-out samples. With ``level: parameters``, its gradients.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"refinement": [False, True], "hidden": [64, 256, 1024]}

    def __init__(
        self,
        level: str | None = None,
        refinement: bool = True,
        mimic_trains_head: bool = False,
        threshold: float = 1e-3,
        base: float = 0.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        lr_scale: float = 1.0,
        reference: bool = False,
    ) -> None:
        super().__init__()
        check_level("ParetoDA", level)
        if level == "features":
            raise uda.UDAError("ParetoDA: held-out samples have features of their own: level 'bottleneck' compares.")
        if hidden < 1 or min(layers, lr_scale, base) < 0:
            raise uda.UDAError("ParetoDA: hidden must be positive, layers, lr_scale and base not negative.")
        self.level, self.refinement, self.mimic_trains_head = level, refinement, mimic_trains_head
        self.threshold, self.lr_scale, self.reference = threshold, lr_scale, reference
        self.base = max(base, 1.0) if reference else base
        self._net = {"hidden": hidden, "layers": layers, "batch_norm": batch_norm}
        self.domains: ClassDomainNets | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source, target, and held-out target batches."""
        return uda.DataNeeds(held_out=True)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Make the class-wise domain nets."""
        if self.domains is None and self.refinement:
            self.domains = ClassDomainNets(model.feature_dim, model.num_classes, **self._net)

    @uda.hookimpl
    def param_groups(self) -> list[dict[str, Any]]:
        """The class-wise domain nets at their own rate."""
        params = self.domains.parameters() if self.domains is not None else []
        return [{"name": self.key, "params": params, "lr_scale": self.lr_scale}]

    def domain_logits(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the class-wise domain nets for detached features of both domains: ``[Bs, C]``, ``[Bt, C]``."""
        source, target = source.detach(), target.detach()
        if self.reference:
            return self.domains(source), self.domains(target)
        return self.domains(torch.cat([source, target])).split([len(source), len(target)])

    def logits_of(self, step: uda.Step, batch: uda.DomainBatch) -> Tensor:
        """Classifier output ``[B, C]`` whose gradient reaches the features, and the classifier only if wanted."""
        if self.mimic_trains_head:
            return batch.logits
        head = step.model.head
        return functional_call(head, {n: p.detach() for n, p in head.named_parameters()}, (batch.features,))

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The mimicking objective, and the loss of the class-wise domain nets."""
        logits = self.logits_of(step, step.target)
        if self.domains is None:
            return {"mimic": mimicking_loss(logits)}
        source, target = self.domain_logits(step.pooled("features"), step.target.features)
        refined = refine(logits, target, raw=self.reference)
        belief = refined if self.reference else refined.softmax(1)
        domain = class_domain_loss(source, step.pooled("y"), target, belief, last_only=self.reference)
        return {"mimic": mimicking_loss(refined), "class_domain": domain}

    def held_out_loss(self, step: uda.Step) -> Tensor:
        """The mimicking loss on the held-out batch; nothing but the weights of this step learns from it."""
        if self.reference:
            logits = self.logits_of(step, step.held_out)
        else:
            with still_statistics(step.model):
                logits = self.logits_of(step, step.held_out)
        if self.domains is None:
            return mimicking_loss(logits)
        with torch.no_grad(), still_statistics(self.domains):
            _, domain = self.domain_logits(step.pooled("features"), step.held_out.features)
        return mimicking_loss(refine(logits, domain, raw=self.reference))

    def level_of(self, model: uda.UDA) -> str:
        """Where gradients are compared in this model."""
        wanted = self.level or ("parameters" if model.gate_level == "parameters" else "bottleneck")
        # without a bottleneck the backbone is all there is
        return wanted if any(p.requires_grad for p in model.bottleneck.parameters()) else "parameters"

    def choose(self, gram: np.ndarray, guide: Vector, loss: float) -> Vector:
        """Simplex weights ``[K]`` from inner products ``[K, K]``, those with the guide ``[K]``, and the held-out loss.

        A guide of zeros is no preference.
        """
        if self.reference:  # the negative mutual information never exceeds the threshold
            return descent(gram, guide, fallback=np.ones(len(guide)))
        return guided(gram, guide) if loss > self.threshold else descent(gram, guide)

    @uda.hookimpl
    def weigh_objectives(self, step: uda.Step, objectives: uda.Objectives) -> dict[str, float] | None:
        """Weights by the linear program, or None where a gradient is not finite."""
        level, loss = self.level_of(step.model), self.held_out_loss(step)
        guide = objectives.inner(loss, level)
        held_out = gather_rows(loss.float()[None]).mean()
        found = torch.cat([objectives.gram(level), guide[:, None], held_out.expand(len(objectives), 1)], 1)
        found = found.double().cpu().numpy()  # the only transfer of the step
        if not np.isfinite(found).all():
            return None
        gram, guide, loss = found[:, :-2], found[:, -2], found[0, -1]
        live = moving(gram)
        weights = np.ones(live.sum())
        if live.sum() > 1:
            weights = live.sum() * self.choose(gram[np.ix_(live, live)], guide[live], loss)
        named = zip(objectives, in_full(weights, live).tolist(), strict=True)
        self.log_later(held_out=loss)
        return {n: w if n == f"{self.key}/mimic" else w + self.base for n, w in named}
