"""Moment Matching for Multi-Source Domain Adaptation (Peng et al., ICCV 2019)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.losses import classification_loss
from uda.nn import full, no_autocast, reverse_gradient
from uda.weighted import Weighted
from uda_multisource.heads import put_heads
from uda_multisource.several import require_several


def moment_distance(sources: Sequence[Tensor], target: Tensor, second: str = "raw") -> Tensor:
    """Distance of the first two moments, from source to target and among sources (Peng et al. 2019, equation 1).

    ``sum_k [mean_i |E f_i^k - E f_t^k| + mean_{i<j} |E f_i^k - E f_j^k|]``, k = 1, 2, with Euclidean norms of vectors.

    Args:
        sources: ``[B_i, F]`` each; target: ``[B, F]``.
        second: ``raw`` moments ``E f^2`` (the paper), or the ``variance`` (a re-implementation).
    """
    with no_autocast(target):
        domains = [full(x) for x in (*sources, target)]
        moments = [x.mean(0) for x in domains]
        powers = [x.square().mean(0) if second == "raw" else x.var(0) for x in domains]
        total = target.new_zeros((), dtype=moments[0].dtype)
        for *ours, theirs in (moments, powers):
            total = total + torch.stack([(m - theirs).norm() for m in ours]).mean()
            if pairs := list(itertools.combinations(ours, 2)):
                total = total + torch.stack([(a - b).norm() for a, b in pairs]).mean()
        return total


class M3SDA(Weighted):
    """Moments of all domains match; each source has a classifier of its own, and the target takes their mean.

    ``mean_i CE(C_i(f_i)) + weight * moment_distance``. With ``pairs`` (M3SDA-beta) each source has two classifiers,
    both trained on it, that disagree on the target as far as they can while the features bring them together (as in
    MCD): the objective ``- discrepancy * mean_i mean |p_i - p_i'|`` behind gradient reversal, in one step where the
    paper takes three. The paper weighs the classifiers' votes by accuracies on the target, which takes its labels; here
    they vote alike.

    Args:
        weight: of the moment distance.
        second: second moments ``raw`` (the paper) or ``variance``.
        pairs: two classifiers a source.
        discrepancy: weight of their disagreement, where there are two.
        ramp: as in :class:`~uda.weighted.Weighted`.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.03, 3.0, "log"), "pairs": [False, True]}

    def __init__(
        self,
        weight: float = 0.25,
        second: str = "raw",
        pairs: bool = False,
        discrepancy: float = 1.0,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        check_choice("M3SDA", "second", second, ("raw", "variance"))
        if discrepancy < 0:
            raise uda.UDAError(f"M3SDA: discrepancy must not be negative, got {discrepancy}.")
        self.second, self.pairs, self.discrepancy = second, pairs, discrepancy

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Classifiers for each source."""
        names = require_several(model, "M3SDA", "CORAL or MCD, which are near to it for one source")
        put_heads(model, names, "M3SDA", copies=2 if self.pairs else 1)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The distance of moments, and for pairs the second classification and the disagreement."""
        batches, target, heads = list(step.sources.values()), step.target.features, step.model.head
        if min(len(target), *(len(b) for b in batches)) < 2:
            raise uda.UDAError("M3SDA needs two samples of each domain in a batch: raise data.batch_size.")
        found = {"moments": self.scaled(step, moment_distance([b.features for b in batches], target, self.second))}
        if self.pairs:
            smoothing, behind = step.model.label_smoothing, reverse_gradient(target, 1.0)
            losses, gaps = [], []
            for i, b in enumerate(batches):
                losses.append(classification_loss(heads.each(i, b.features)[1], b.y, smoothing, b.weight))
                one, other = (full(z).softmax(1) for z in heads.each(i, behind))
                gaps.append((one - other).abs().mean())
            gap = torch.stack(gaps).mean()
            self.log_later(gap=gap.detach())
            found |= {"second": torch.stack(losses).mean(), "discrepancy": -self.discrepancy * gap}
        return found
