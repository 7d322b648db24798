"""Mutual learning network with neighbourhood invariance for universal adaptation (MLNet: Lu et al., AAAI 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Beta
from torch.nn import functional as F

import uda
from uda.losses import class_distributions
from uda.nn import Bank, full, no_autocast
from uda_universal.ovanet import OVANet


def neighbours(cosine: Tensor, share: float) -> Tensor:
    """Columns of more than ``share`` times the row's largest cosine, and that one itself: a mask ``[B, N]``.

    As many as are about as near as the nearest one; with a largest cosine of 0 or less it is the nearest alone.
    """
    nearest = cosine.amax(1, keepdim=True)
    return (cosine > share * nearest) | (cosine == nearest)


@torch.no_grad()
def neighbour_sets(memory: Tensor, share: float, most: int, chunk: int = 2**24) -> tuple[Tensor, Tensor]:
    """Each row's :func:`neighbours` among the others: columns ``[N, most]``, padded with N, and their numbers ``[N]``.

    Args:
        memory: unit rows ``[N, F]``; most: of more neighbours the nearest ones stay; chunk: cosines at a time.
    """
    n = len(memory)
    sets = torch.full((n, most), n, dtype=torch.int32, device=memory.device)
    count = torch.zeros(n, dtype=torch.long, device=memory.device)
    step = max(1, chunk // n)
    for start in range(0, n, step):
        cosine = memory[start : start + step] @ memory.T
        own = torch.arange(len(cosine), device=memory.device)
        cosine[own, own + start] = -1.0
        near = neighbours(cosine, share)
        near[own, own + start] = False
        if int(near.sum(1).max()) > most:
            near &= cosine >= cosine.topk(most, dim=1).values[:, -1:]
        found = near.sum(1)
        row, column = near.nonzero(as_tuple=True)  # row by row
        place = torch.arange(len(row), device=row.device) - (found.cumsum(0) - found)[row]
        fits = place < most  # of equally near ones the first
        sets[start + row[fits], place[fits]] = column[fits].to(torch.int32)
        count[start + own] = found.clamp_max(most)
    return sets, count


def overlaps(sets: Tensor, count: Tensor, index: Tensor, others: Tensor) -> Tensor:
    """``|N_i n N_j| / |N_i u N_j|`` of the sets of some rows and of others ``[B, M]``; 0 where both are empty.

    Args:
        sets, count: as :func:`neighbour_sets` returns them; index: ``[B]``; others: ``[M]``.
    """
    sets = sets[:, : max(int(count.max()), 1)]
    member = torch.zeros(len(sets) + 1, len(index), device=sets.device)
    member.scatter_(0, sets[index].T.long(), 1.0)[-1] = 0.0  # the last row is the padding
    common = F.embedding_bag(sets[others], member, mode="sum").T
    return common / (count[index][:, None] + count[others] - common).clamp_min(1)


def neighbourhood_loss(
    features: Tensor, memory: Tensor, index: Tensor, sets: Tensor, count: Tensor, share: float, scale: float
) -> Tensor:
    """``mean_i 1/|N_i| sum_{j in N_i} J_ij (-log s_ij)``: a target sample is drawn to its sure neighbours.

    ``s_i`` is the softmax of ``scale`` times the cosines to all target samples, ``N_i`` the present :func:`neighbours`
    and ``J`` the :func:`overlaps` of the kept sets. The batch itself is compared as it is now.

    Args:
        features: ``[B, F]``; memory: last unit features of the whole target ``[N, F]``, constants; index: ``[B]``.
    """
    with no_autocast(features):
        f = F.normalize(full(features), dim=1)
        cosine = (f @ memory.to(f).T).index_copy(1, index, f @ f.detach().T).scatter(1, index[:, None], -1.0)
        near = neighbours(cosine.detach(), share)
        columns = near.any(0).nonzero().flatten()
        weight = overlaps(sets, count, index, columns) * near[:, columns] / near.sum(1, keepdim=True)
        return -(weight.to(f) * (scale * cosine).log_softmax(1)[:, columns]).sum(1).mean()


def mixed(source: Tensor, target: Tensor, alpha: float) -> Tensor:
    """``a f_s + (1 - a) f_t`` with a of Beta(alpha, alpha) for each source row ``[B, F]``; target rows are repeated."""
    partner = target[torch.arange(len(source), device=target.device) % len(target)]
    a = Beta(alpha, alpha).sample((len(source), 1)).to(source)
    return a * source + (1 - a) * partner


def own_class_denied(logits: Tensor, y: Tensor) -> Tensor:
    """``mean -log(1 - q(y))`` of logits ``[B, 2, C]`` and class ids ``[B]`` or distributions ``[B, C]``."""
    with no_autocast(logits):
        own = class_distributions(y if y.ndim == 1 else y.argmax(1), logits.shape[2], torch.bool)
        return -full(logits).log_softmax(1)[:, 0][own].mean()


def disagreement(logits: Tensor, pairs: Tensor) -> Tensor:
    """``-mean_i mean_k p_i(k) q_i(k)`` of the classifier's ``[B, C]`` and the binary classifiers' ``[B, 2, C]``."""
    with no_autocast(logits):
        return -(full(logits).softmax(1) * full(pairs).softmax(1)[:, 1]).mean()


class MLNet(OVANet):
    """OVANet with target neighbourhoods, mixed samples as unknown ones, and classifiers that learn from each other.

    To the objectives of :class:`~uda_universal.ovanet.OVANet` it adds ``neighbour_weight`` times
    :func:`neighbourhood_loss`, ``mixup_weight`` times :func:`own_class_denied` of :func:`mixed` source and target
    features, which are no sample of the source's class, and ``consistency_weight`` times :func:`disagreement` on the
    target. Inference is OVANet's. The sets whose overlap says how sure a neighbour is are those of the memory at the
    last multiple of ``every`` of the run; before the first there is no neighbourhood objective.

    Args:
        weight: of the binary classifiers, 0.5; entropy_weight: 0.1; mixup_weight: 0.1; neighbour_weight: 0.5.
        consistency_weight: 0.16 on Office-31 and Office-Home, 0.32 on VisDA.
        alpha: of the Beta distribution of the mixture.
        share: of the nearest one's cosine, above which a sample is a neighbour.
        scale: of cosines in the softmax.
        every: share of the run between two looks at all neighbourhoods (published: 200 of 10 000 steps, 500 of 25 000).
        most: neighbours that a look keeps of a sample, the nearest; bounds the memory. Published: all.
        threshold: of the probability of "no".
        unit: weight vectors of the binary classifiers of length 1, which the authors of OVANet have and those of MLNet
            have not.
        class_balanced: ask for class-balanced source batches.
        lr_scale: learning rate of the binary classifiers relative to the head's.
    """

    search_space: ClassVar[dict[str, Any]] = {
        **OVANet.search_space, "neighbour_weight": (0.05, 2.0, "log"), "consistency_weight": (0.05, 1.0, "log"),
    }  # fmt: skip
    sets: Tensor
    count: Tensor
    looks: Tensor

    def __init__(
        self,
        weight: float = 0.5,
        entropy_weight: float = 0.1,
        mixup_weight: float = 0.1,
        consistency_weight: float = 0.16,
        neighbour_weight: float = 0.5,
        alpha: float = 2.0,
        share: float = 0.875,
        scale: float = 10.0,
        every: float = 0.02,
        most: int = 1024,
        threshold: float = 0.5,
        unit: bool = False,
        class_balanced: bool = True,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, entropy_weight, threshold, unit, class_balanced, lr_scale)
        if min(mixup_weight, consistency_weight, neighbour_weight) < 0 or min(alpha, scale) <= 0:
            raise uda.UDAError("MLNet: weights must not be negative; alpha and scale are positive.")
        if not 0 < share <= 1 or not 0 < every <= 1 or most < 1:
            raise uda.UDAError("MLNet: share and every lie in (0, 1], and most is 1 or more.")
        self.mixup_weight, self.consistency_weight, self.neighbour_weight = (
            mixup_weight, consistency_weight, neighbour_weight,
        )  # fmt: skip
        self.alpha, self.share, self.scale, self.every, self.most = alpha, share, scale, every, most
        self.memory: Bank | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains, and the whole target before the first step."""
        refresh = {"target"} if self.neighbour_weight else set()
        return uda.DataNeeds(class_balanced=self.class_balanced, refresh=refresh)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The binary classifiers, and room for features and neighbours of the whole target."""
        super().build(model)
        if self.memory is None:
            n = max(model.sizes.get(model.target_name, 0), 1)
            self.memory = Bank(n, features=(model.feature_dim,))
            self.register_buffer("sets", torch.full((n, min(self.most, n)), n, dtype=torch.int32))
            self.register_buffer("count", torch.zeros(n, dtype=torch.long))
            self.register_buffer("looks", torch.zeros((), dtype=torch.long))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Fill the memory, once."""
        if self.neighbour_weight and not self.memory.filled.all():
            self.memory.features.copy_(F.normalize(bank.target.features, dim=1))
            self.memory.filled.fill_(True)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """OVANet's objectives and the three others."""
        out, target = super().refine_classifier(step), step.target
        if self.mixup_weight:
            mixture = self.pairs(mixed(step.pooled("features"), target.features, self.alpha))
            out["mixup"] = self.mixup_weight * own_class_denied(mixture, step.pooled("y"))
        if self.consistency_weight:
            out["consistency"] = self.consistency_weight * disagreement(target.logits, self.pairs(target.features))
        if self.neighbour_weight and self.looks > 0:
            out["neighbour"] = self.neighbour_weight * neighbourhood_loss(
                target.features, self.memory.features, target.index, self.sets, self.count, self.share, self.scale
            )
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Keep the features of the batch, and look at all neighbourhoods when it is time."""
        if not self.neighbour_weight:
            return
        self.memory.write(step.target.index, features=F.normalize(full(step.target.features), dim=1))
        due = int(step.progress / self.every + 1e-6)
        if due > self.looks:
            sets, count = neighbour_sets(self.memory.features, self.share, self.sets.shape[1])
            self.sets.copy_(sets)
            self.count.copy_(count)
            self.looks.fill_(due)
            self.log_later(neighbours=count.float().mean())
