"""Unified optimal transport framework for universal domain adaptation (UniOT: Chang et al., NeurIPS 2022)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import Bank, CosineHead, full, gather_rows, no_autocast
from uda.nn.heads import class_vectors
from uda.passes import target_now
from uda_universal.common import SETTINGS
from uda_universal.detection import adaptive_filling, confident, mass_of_rows, match


@torch.no_grad()
def cluster_targets(cosines: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Soft assignment ``[N, K]``, rows of sum 1, of samples to equally heavy clusters, by entropic transport.

    Args:
        cosines: of samples and cluster prototypes ``[N, K]``.
        epsilon: of the entropy; iterations: of Sinkhorn's algorithm, the authors stop after three.
    """
    import ot

    cosines = cosines.detach()
    empty = cosines.new_empty(0)
    plan = ot.bregman.sinkhorn_log(empty, empty, -cosines, epsilon, numItermax=iterations, stopThr=0.0, warn=False)
    return plan / plan.sum(1, keepdim=True)


def private_class_discovery(
    features: Tensor, memory: Tensor, allowed: Tensor, drawn: Tensor, clusters: Any, temperature: float = 0.1
) -> Tensor:
    """Each sample and its nearest neighbour are assigned to clusters, each by the other's assignment (equation 13).

    Args:
        features: unit rows of the batch ``[B, F]``; memory: unit rows of the target ``[N, F]``, constants.
        allowed: rows of the memory that may be neighbours ``[N]``; drawn: rows that fill up the assignment ``[M, F]``.
        clusters: ``[*, F] -> [*, K]``, cosines over ``temperature``.
    """
    own = torch.eye(len(features), dtype=torch.bool, device=features.device)
    pool = torch.cat([memory, features])
    closeness = torch.cat(
        [(features @ memory.T).masked_fill(~allowed, -2.0), (features @ features.T).masked_fill(own, -2.0)], 1
    )
    near = pool[closeness.argmax(1)]
    anchor, neighbour = clusters(features), clusters(near)
    q = cluster_targets(torch.cat([anchor, neighbour, clusters(drawn)]) * temperature)
    q_anchor, q_near = q[: len(features)], q[len(features) : 2 * len(features)]

    def cross(target: Tensor, logits: Tensor) -> Tensor:
        return -(target * logits.log_softmax(1)).sum(1).mean()

    swapped = (cross(q_near, anchor) + cross(q_anchor, neighbour)) / 2
    return (cross(q_anchor, anchor) + swapped) / 2


class UniOT(uda.Plugin):
    """Unbalanced transport finds the samples of common classes, balanced transport the clusters of the others.

    ``weight * (L_ccd + L_pcd)``. Common class detection: target samples (the batch, and ``fill`` rows of a memory) are
    transported to the classifier's weight vectors (:mod:`uda_universal.detection`); those that are confident learn the
    class that they are sent to. :func:`private_class_discovery` clusters the target. Inference is by one transport of
    the whole target: unknown is a sample whose largest entry is below the mean mass of a row. Samples that were not
    there get the row that they would have had. Published with a cosine classifier.

    Args:
        weight: lambda, 0.1 in all published runs.
        gamma: cosine above which a sample counts as near a class, in the filling.
        mu: share of the classes' old mass at an update (published: 0.7 for Office-31 and VisDA, 1 else).
        clusters: K (published: Office-31 50, Office-Home 150, VisDA 500, DomainNet 1000).
        fill: rows of the memory in a transport (published: 2000 to 5000); no more than the target has.
        warmup: steps before the detection starts.
        temperature: of the clusters' cosines.
        class_balanced: ask for class-balanced source batches.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.01, 0.5, "log"), "clusters": [50, 150, 500]}
    beta: Tensor
    log_v: Tensor
    total: Tensor

    def __init__(
        self,
        weight: float = 0.1,
        gamma: float = 0.7,
        mu: float = 0.7,
        clusters: int = 50,
        fill: int = 2000,
        warmup: int = 100,
        temperature: float = 0.1,
        class_balanced: bool = True,
    ) -> None:
        super().__init__()
        if weight < 0 or not -1 <= gamma <= 1 or not 0 <= mu <= 1 or min(clusters, fill) < 1 or warmup < 0:
            raise uda.UDAError(
                "UniOT: weight and warmup must not be negative, gamma is a cosine, mu a share in [0, 1], and clusters "
                "and fill are 1 or more."
            )
        if temperature <= 0:
            raise uda.UDAError(f"UniOT: temperature must be positive, got {temperature}.")
        self.weight, self.gamma, self.mu, self.num_clusters, self.fill = weight, gamma, mu, clusters, fill
        self.warmup, self.temperature, self.class_balanced = warmup, temperature, class_balanced
        self.memory: Bank | None = None
        self.clusters: CosineHead | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains."""
        return uda.DataNeeds(class_balanced=self.class_balanced)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Clusters, and room for the features of the whole target."""
        class_vectors(model.head, "UniOT")
        if self.memory is None:
            classes = model.num_classes
            self.memory = Bank(max(model.sizes.get(model.target_name, 0), 1), features=(model.feature_dim,))
            self.clusters = CosineHead(model.feature_dim, self.num_clusters, self.temperature)
            self.register_buffer("beta", torch.full((classes,), 1 / classes))
            self.register_buffer("log_v", torch.zeros(classes))
            self.register_buffer("total", torch.tensor([0.0, 1.0]))  # mass and rows of the last plan

    def drawn(self, size: int) -> Tensor:
        """Random rows of the memory ``[size, F]``; none before the first is written."""
        filled = self.memory.filled.nonzero().flatten()
        if not len(filled):
            return self.memory.features[:0]
        return self.memory.features[filled[torch.randint(0, len(filled), (size,), device=filled.device)]]

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Both objectives on the target."""
        batch = step.target
        with no_autocast(batch.features):
            features = F.normalize(full(batch.features), dim=1)
            allowed = self.memory.filled.clone()
            allowed[batch.index] = False  # the batch is compared as it is now
            found = private_class_discovery(
                features, self.memory.features, allowed, self.drawn(self.num_clusters), self.clusters, self.temperature
            )
            out = {"discovery": self.weight * found}
            if step.index >= self.warmup:
                rows = features.detach()
                prototypes = F.normalize(full(class_vectors(step.model.head, "UniOT")).detach(), dim=1)
                filled = torch.cat([self.drawn(min(self.fill, len(self.memory))).to(rows.dtype), rows])
                plan = match(adaptive_filling(filled, prototypes, self.beta, self.gamma), self.beta)
                label, keep = (v[-len(rows) :] for v in confident(plan))
                loss = F.cross_entropy(full(batch.logits), label, reduction="none") * keep
                out["detection"] = self.weight * loss.sum() / keep.sum().clamp_min(1)
                batch.cache[f"{self.key}/mass"] = plan.plan.sum(0)
                self.log_later(kept=keep.float().mean())
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Keep the features of the batch and the mass of the classes."""
        self.memory.write(step.target.index, features=F.normalize(full(step.target.features), dim=1))
        mass = step.target.cache.get(f"{self.key}/mass")
        if mass is not None:
            self.beta.mul_(self.mu).add_((1 - self.mu) * gather_rows(mass[None]).mean(0).to(self.beta.dtype))

    def similarity(self, model: uda.UDA, features: Tensor) -> Tensor:
        """Cosines ``[B, C]`` of features and classes."""
        with no_autocast(features):
            vectors = full(class_vectors(model.head, "UniOT"))
            return F.normalize(full(features), dim=1) @ F.normalize(vectors, dim=1).T

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """Transport the whole target."""
        pool = target_now(model)
        if pool is None:
            return
        prototypes = F.normalize(full(class_vectors(model.head, "UniOT")), dim=1)
        rows = F.normalize(pool.features, dim=1)
        generator = torch.Generator().manual_seed(0)
        similarity = adaptive_filling(rows, prototypes, self.beta, self.gamma, generator)
        plan = match(similarity, self.beta, tol=1e-6)
        self.log_v.copy_(plan.log_v)
        self.total.copy_(torch.tensor([plan.total, len(similarity)]))

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: Any) -> uda.Prediction | None:
        """The class that the plan sends a target sample to; unknown where it sends little. None before a plan."""
        total, n = self.total.tolist()
        if total == 0 or batch.role == "source":
            return None
        row = mass_of_rows(self.similarity(model, batch.features), self.log_v, int(n))
        value, label = row.max(1)
        missing = math.log(total / n) - value
        return uda.Prediction(label, full(batch.logits).softmax(1).amax(1), missing > 0, missing)
