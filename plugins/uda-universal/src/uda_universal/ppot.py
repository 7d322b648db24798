"""Prototypical partial optimal transport for universal domain adaptation (PPOT: Yang, Gu and Sun, AAAI 2023)."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from uda_transport.solvers import check_plan

import uda
from uda.kernels import squared_distances
from uda.losses import class_distributions, entropy
from uda.nn import full, gather_rows, no_autocast
from uda_universal.common import SETTINGS, marked


@torch.no_grad()
def partial_plan(cost: Tensor, alpha: float, beta: float, epsilon: float = 0.01) -> Tensor:
    """Entropic partial plan ``[C, B]`` of mass alpha between ``alpha / (beta C)`` a class and ``1 / B`` a sample.

    Args:
        cost: ``[C, B]``, of maximum 1; alpha: share of the target in common classes; beta: share of common classes.

    Raises:
        UDAError: the plan is not finite.
    """
    import ot

    classes, samples = cost.shape
    matrix = cost.detach().cpu().double().numpy()
    a, b = np.full(classes, alpha / beta / classes), np.full(samples, 1 / samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mass = min(alpha, a.sum(), b.sum())  # rounding must not ask for more than there is
        plan = ot.partial.entropic_partial_wasserstein(a, b, matrix, reg=epsilon, m=mass, stopThr=1e-10)
    check_plan(plan, "Partial transport", "Check that the features are finite.")
    return torch.from_numpy(plan).to(cost.device, full(cost).dtype)


def farthest_weights(cost: Tensor, plan: Tensor, alpha: float, share: float) -> tuple[Tensor, Tensor]:
    """Weights ``[B]`` of certainty, ``B * sum_c P_cb / alpha``, and of doubt, one minus that.

    Doubt only for the ``share`` of the samples that are farthest from all prototypes; others have none.

    Args:
        cost: ``[C, B]``; plan: ``[C, B]``.
    """
    mass = plan.sum(0) * plan.shape[1] / alpha
    count = round(share * cost.shape[1])
    far = torch.zeros_like(mass)
    far[cost.amin(0).topk(count).indices] = 1.0
    return mass, far * (1 - mass)


class PPOT(uda.Plugin):
    """A part of the target is transported to a part of the source's class prototypes, and both are weighed by it.

    ``w-CE(source) + weight * sqrt(sum P |mu_c - f|^2) + positive * mean w+ H(p_t) - negative * mean w- H(p_t)``. P is
    :func:`partial_plan` on unit features; class weights w follow its rows, w+ and w- (:func:`farthest_weights`) its
    columns. The mass alpha is the share of sure target samples, and beta the share of classes of weight above 1: both
    are estimated, no number of classes is told. The entropies do not reach the classifier. Unknown: largest softmax
    below ``threshold``.

    Args:
        weight: of the transport, 5 in the authors' code; positive: 0.01; negative: 2, of the entropies.
        threshold: of the confidence in inference; confident: that of a sure sample in the estimate of alpha.
        momentum: share of the new value in prototypes and class weights; beta_momentum: of beta.
        alpha_momentum: of alpha, within an epoch.
        far: share of a batch whose entropy may rise.
        epsilon: of the transport's entropy, with distances in [0, 1].
        warmup: share of the run that trains on the source alone (the authors: 1000 of 6000 steps).
        class_balanced: ask for class-balanced source batches.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.5, 10.0, "log"), "negative": (0.1, 3.0, "log")}
    prototypes: Tensor
    class_weight: Tensor
    share: Tensor

    def __init__(
        self,
        weight: float = 5.0,
        positive: float = 0.01,
        negative: float = 2.0,
        threshold: float = 0.75,
        confident: float = 0.9,
        momentum: float = 0.1,
        beta_momentum: float = 0.01,
        alpha_momentum: float = 0.001,
        far: float = 0.25,
        epsilon: float = 0.01,
        warmup: float = 0.15,
        class_balanced: bool = True,
    ) -> None:
        super().__init__()
        shares = (threshold, confident, momentum, beta_momentum, alpha_momentum, far, warmup)
        if min(weight, positive, negative) < 0 or epsilon <= 0 or not all(0 <= v <= 1 for v in shares):
            raise uda.UDAError(
                "PPOT: weights must not be negative, epsilon must be positive, and thresholds, momenta, far and warmup "
                "lie in [0, 1]."
            )
        self.weight, self.positive, self.negative, self.epsilon = weight, positive, negative, epsilon
        self.threshold, self.confident, self.far, self.warmup = threshold, confident, far, warmup
        self.momentum, self.beta_momentum, self.alpha_momentum = momentum, beta_momentum, alpha_momentum
        self.class_balanced = class_balanced

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains, as a whole at the start of each epoch."""
        return uda.DataNeeds(class_balanced=self.class_balanced, refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for prototypes, class weights, and the shares alpha and beta (0: not started)."""
        if "share" not in self._buffers:
            self.register_buffer("prototypes", torch.zeros(model.num_classes, model.feature_dim))
            self.register_buffer("class_weight", torch.ones(model.num_classes))
            self.register_buffer("share", torch.zeros(2))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Prototypes of the source and alpha from the whole pools, once the classifier has learnt something."""
        if model.progress < self.warmup:
            return
        features = torch.cat([F.normalize(p.features, dim=1) for p in bank.sources.values()])
        own = class_distributions(torch.cat([p.y for p in bank.sources.values()]), model.num_classes)
        self.prototypes.copy_(F.normalize(own.T.to(features.dtype) @ features, dim=1))
        sure = bank.target.logits.softmax(1).amax(1) > self.confident
        alpha = sure.float().mean().clamp(0.01, 1.0)  # a plan of no mass says nothing
        if self.share[1] == 0:
            self.share[1] = alpha
        self.share[0] = alpha

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Class weights of the source samples, as a weighted mean; they multiply those of another plugin."""
        for batch in step.sources.values():
            w = class_distributions(batch.y, len(self.class_weight)) @ self.class_weight
            w = w / w.mean().clamp_min(1e-12)
            batch.weight = w if batch.weight is None else batch.weight * w

    def moved(self, step: uda.Step) -> Tensor:
        """Prototypes ``[C, F]`` a little nearer to the class means of the batch; a gradient goes to its features."""
        features = F.normalize(full(step.pooled("features")), dim=1)
        own = class_distributions(step.pooled("y"), len(self.prototypes)).to(features.dtype)
        mine = own.T @ features
        counts, sums = gather_rows(own.sum(0)[None]).sum(0), gather_rows(mine[None]).sum(0)
        sums = sums + (mine - mine.detach())  # what other ranks add is constant here
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1e-12)[:, None], self.prototypes)
        return F.normalize((1 - self.momentum) * self.prototypes + self.momentum * means, dim=1)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Transport and entropies; nothing before the first prototypes."""
        alpha, beta = self.share.tolist()
        if beta == 0:
            return {"transport": 0.0 * step.target.features.sum()}
        batch, head = step.target, step.model.head
        frozen = {k: v.detach() for k, v in head.state_dict(keep_vars=True).items()}
        h = entropy(functional_call(head, frozen, (batch.features,)))
        with no_autocast(batch.features):
            prototypes = self.moved(step)
            distance = squared_distances(prototypes, F.normalize(full(batch.features), dim=1))
            largest = distance.detach().max().clamp_min(1e-12)
            plan = partial_plan(distance / largest, alpha, beta, self.epsilon)
            transport = (plan * distance).sum().clamp_min(1e-12).sqrt()
            sure, doubt = farthest_weights(distance.detach(), plan, alpha, self.far)
        share = (full(batch.logits).softmax(1).amax(1) >= self.confident).float().mean().detach()
        batch.cache[self.key] = (prototypes.detach(), plan.sum(1) * plan.shape[1], share)
        self.log_later(alpha=alpha, beta=beta)
        return {
            "transport": self.weight * transport,
            "certainty": self.positive * (sure * h).mean(),
            "doubt": -self.negative * (doubt * h).mean(),
        }

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Prototypes, class weights, alpha and beta follow the batch."""
        if self.key not in step.target.cache:
            return
        prototypes, mass, sure = step.target.cache[self.key]
        self.prototypes.copy_(prototypes)
        mass = gather_rows(mass[None]).mean(0)
        w = self.momentum * mass + (1 - self.momentum) * self.class_weight
        self.class_weight.copy_(w * len(w) / w.sum())
        known = (self.class_weight > 1).float().mean()
        for i, (rate, value) in enumerate(
            ((self.alpha_momentum, gather_rows(sure[None]).mean()), (self.beta_momentum, known))
        ):
            self.share[i] = ((1 - rate) * self.share[i] + rate * value).clamp(0.01, 1.0)

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: uda.DomainBatch, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown by the confidence."""
        doubt = 1 - full(batch.logits).softmax(1).amax(1)
        return marked(batch, prediction, doubt, 1 - self.threshold)
