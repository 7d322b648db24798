"""Domain consensus clustering for universal adaptation (DCC: Li et al., CVPR 2021)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.kernels import contrastive_discrepancy
from uda.nn import full, gather_rows, no_autocast
from uda.passes import Pools
from uda_universal.matching import candidates, match, unit_centres


def cluster_loss(features: Tensor, centres: Tensor, count: Tensor, code: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the cosines to cluster centres over T, the own cluster being right.

    Args:
        features: ``[B, F]``; centres: ``[K, F]``, constants, of which the first ``count`` are in use; code: ``[B]``.
    """
    with no_autocast(features):
        cosine = F.normalize(full(features), dim=1) @ centres.to(full(features)).T
        unused = torch.arange(len(centres), device=features.device) >= count
        return F.cross_entropy((cosine / temperature).masked_fill(unused, -torch.inf), code)


def moved_centres(centres: Tensor, features: Tensor, code: Tensor) -> Tensor:
    """Centres ``[K, F]`` after a batch: ``m <- s m + (1 - s) b`` at unit length, s the cosine of m and the batch's b.

    Args:
        features: unit rows of the batch ``[B, F]`` of clusters ``code`` ``[B]``.
    """
    batch = unit_centres(features, code, len(centres))
    keep = (centres * batch).sum(1, keepdim=True)
    moved = F.normalize(keep * centres + (1 - keep) * batch, dim=1)
    there = torch.zeros(len(centres), dtype=torch.bool, device=centres.device).index_fill_(0, code, True)
    return torch.where(there[:, None], moved, centres)


class DCC(uda.Plugin):
    """Clusters the target, matches clusters with classes by consensus, and aligns the matched ones class by class.

    ``weight * CDD + reg_weight * w(p) * L_reg``: the contrastive domain discrepancy
    (:func:`uda.kernels.contrastive_discrepancy`) over the classes that have a cluster, and :func:`cluster_loss` of all
    target samples, whose weight ``w(p) = exp(-ramp (1 - p))`` rises with progress p. Every ``refresh_every`` steps the
    whole target is clustered with several numbers of clusters, and that of the best consensus stays
    (:func:`uda_universal.matching.match`); once it is the same twice, the search ends and clusters move on from their
    centres. A sample whose nearest centre has no class is unknown; the classifier names the others.

    The published batches are drawn class by class from matched clusters. Here source batches are class-balanced and
    target batches uniform: classes that a batch lacks in one domain are left out of its discrepancy.

    Args:
        weight: of the discrepancy (0.1).
        reg_weight: of the regulariser (1); ramp: gamma, 3. temperature: of its cosines.
        refresh_every: steps between two clusterings (200).
        first: clusters that the first search starts from; 0: as many as classes. Later ones start from ``step``.
        step: between two numbers of clusters (2 on Office-31, 5 on Office-Home).
        max_search: most clusters, in classes (3 on Office-31, 5 on Office-Home).
        falls: a search stops after so many falls of the consensus in a row (4).
        min_samples: a matched cluster of no more samples takes no part, and counts as unmatched (the authors': 3 or 6).
        settle: end the search once it has found a number twice.
        starts: of k-means; the best counts.
        warmup: share of the run before the objectives set in and the first clustering counts.
        class_balanced: ask for class-balanced source batches.
        kernels, factor: number of kernels of the discrepancy and ratio of their widths.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.01, 1.0, "log"), "reg_weight": (0.1, 2.0, "log")}
    centres: Tensor
    partner: Tensor
    code: Tensor
    count: Tensor
    figures: Tensor

    def __init__(
        self,
        weight: float = 0.1,
        reg_weight: float = 1.0,
        ramp: float = 3.0,
        temperature: float = 0.1,
        refresh_every: int = 200,
        first: int = 0,
        step: int = 2,
        max_search: int = 3,
        falls: int = 4,
        min_samples: int = 3,
        settle: bool = True,
        starts: int = 3,
        warmup: float = 0.0,
        class_balanced: bool = True,
        kernels: int = 5,
        factor: float = 2.0,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if min(weight, reg_weight, ramp, first, falls, min_samples, refresh_every) < 0 or temperature <= 0:
            raise uda.UDAError(f"{name}: temperature must be positive; weights, ramp and counts must not be negative.")
        if min(step, max_search, starts, kernels) < 1 or not 0 <= warmup < 1:
            raise uda.UDAError(f"{name}: step, max_search, starts and kernels are 1 or more; warmup is in [0, 1).")
        self.weight, self.reg_weight, self.ramp, self.temperature = weight, reg_weight, ramp, temperature
        self.refresh_every, self.first, self.step, self.max_search = refresh_every, first, step, max_search
        self.falls, self.min_samples, self.settle, self.starts = falls, min_samples, settle, starts
        self.warmup, self.class_balanced, self.kernels, self.factor = warmup, class_balanced, kernels, factor

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains, and all of both between two stages."""
        return uda.DataNeeds(
            class_balanced=self.class_balanced, refresh={"source", "target"}, refresh_every=self.refresh_every
        )

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the clusters at their largest number, and for the cluster of each target sample."""
        if "centres" in self._buffers:
            return
        samples = max(model.sizes.get(model.target_name, 0), 1)
        most = max(self.max_search * model.num_classes, self.first)
        self.register_buffer("centres", torch.zeros(most, model.feature_dim))
        self.register_buffer("partner", torch.full((most,), -1))
        self.register_buffer("code", torch.zeros(samples, dtype=torch.long))
        self.register_buffer("count", torch.zeros(3, dtype=torch.long))  # clusters now, and of the last two searches
        self.register_buffer("figures", torch.zeros(3))  # consensus, matched clusters, share of matched samples

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Cluster the target, and match."""
        source, y = (torch.cat([getattr(p, name) for p in bank.sources.values()]) for name in ("features", "y"))
        self.cluster(model, source, y, bank.target.features)

    def cluster(self, model: uda.UDA, source: Tensor, y: Tensor, target: Tensor) -> None:
        """Cluster and match features of whole domains ``[N, F]``, ``[M, F]``; y ``[N]``."""
        now, last, before = self.count.tolist()
        settled = self.settle and last > 0 and last == before  # searches of the warm-up count as 0
        most = min(len(self.centres), len(target))
        first = (self.first or model.num_classes) if last == 0 else self.step
        numbers = [now] if settled else candidates(first, self.step, most)
        start = self.centres[:now] if settled else None
        found = match(
            source, y, target, model.num_classes, numbers, start, self.falls, self.starts, self.min_samples,
            model.base_seed,
        )  # fmt: skip
        k = found.clusters
        self.centres.zero_()
        self.centres[:k] = found.centres
        self.partner.fill_(-1)
        self.partner[:k] = found.partner
        self.code.copy_(found.code)
        self.count.copy_(torch.tensor([k, k if model.progress >= self.warmup else 0, last]))
        matched = found.partner >= 0
        self.figures.copy_(torch.stack([
            torch.tensor(found.score), matched.sum().cpu().float(), matched[found.code].float().mean().cpu()
        ]))  # fmt: skip

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Discrepancy over matched classes, and the regulariser over all clusters."""
        y, features = step.pooled("y"), step.target.features
        y = y if y.ndim == 1 else y.argmax(1)
        code = self.code[step.target.index]
        on = float(step.progress >= self.warmup)
        value = contrastive_discrepancy(
            step.pooled("features"), y, features, self.partner[code], step.model.num_classes, self.kernels, self.factor
        )
        self.log_later(
            clusters=self.count[0].float, consensus=self.figures[0].clone, matched=self.figures[1].clone,
            matched_share=self.figures[2].clone,
        )  # fmt: skip
        out = {"cdd": on * self.weight * value}
        if self.reg_weight:
            rising = on * self.reg_weight * math.exp(-self.ramp * (1 - step.progress))
            out["clusters"] = rising * cluster_loss(features, self.centres, self.count[0], code, self.temperature)
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Centres follow the samples of the batch."""
        features = gather_rows(F.normalize(full(step.target.features), dim=1))
        code = gather_rows(self.code[step.target.index])
        self.centres.copy_(moved_centres(self.centres, features, code))

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: uda.DomainBatch, prediction: uda.Prediction) -> uda.Prediction | None:
        """Unknown where the nearest centre has no class; the score is by how much one without is nearer."""
        if batch.role == "source" or not self.count[0]:
            return None
        with no_autocast(batch.features):
            cosine = F.normalize(full(batch.features), dim=1) @ self.centres.to(full(batch.features)).T
        used = torch.arange(len(self.centres), device=cosine.device) < self.count[0]
        matched = self.partner >= 0
        near, strange = (cosine.masked_fill(~(used & m), -1.0).amax(1) for m in (matched, ~matched))
        score = strange - near
        return prediction.rejecting(score > 0, score)
