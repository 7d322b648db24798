"""Aligning Domain-Specific Distribution and Classifier for Cross-Domain Classification from Multiple Sources (Zhu et al., AAAI 2019)."""  # noqa: E501

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.kernels import multi_kernel_mmd
from uda.nn import full, no_autocast
from uda.weighted import Weighted
from uda_multisource.heads import put_heads
from uda_multisource.several import require_several


def classifier_gap(logits: list[Tensor], known: Tensor | None = None) -> Tensor:
    """``mean |p_i - p_j|`` over entries and over pairs of classifiers on the same target, ``[B, C]`` each.

    Args:
        known: bool ``[M, C]``, the classes that each classifier was trained on: two need not agree on one that either
            does not know.
    """
    with no_autocast(logits[0]):
        probs = [full(z).softmax(1) for z in logits]
        known = logits[0].new_ones(len(probs), probs[0].shape[1], dtype=torch.bool) if known is None else known
        pairs = itertools.combinations(zip(probs, known, strict=True), 2)
        return torch.stack([((p - q).abs() * (k & m)).mean() for (p, k), (q, m) in pairs]).mean()


class MFSAN(Weighted):
    """A branch for each source: its features match the target's in the branch, and all classifiers agree on the target.

    ``mean_i [CE_i + weight * MMD(h_i(f_i), h_i(f_t))] + weight * agreement * mean_{i<j} mean |p_i - p_j|`` (Zhu et al.
    2019, equations 1 to 4), with branches ``h_i`` (Linear-BatchNorm-ReLU here, three convolutions in the paper) behind
    the shared net. The paper's code takes one optimiser step a source; here one step is for all. The target takes the
    mean vote.

    Args:
        hidden: width of a branch.
        agreement: of the classifiers, relative to the MMD (1 in the paper).
        kernels, factor: number of Gaussian kernels and ratio of their variances.
        weight, ramp: of both, growing as ``warm_start`` in the paper; see :class:`~uda.weighted.Weighted`.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 3.0, "log"), "hidden": [64, 256]}

    def __init__(
        self,
        weight: float = 1.0,
        hidden: int = 256,
        agreement: float = 1.0,
        kernels: int = 5,
        factor: float = 2.0,
        ramp: str = "warm_start",
    ) -> None:
        super().__init__(weight, ramp)
        if hidden < 1 or agreement < 0 or kernels < 1 or factor <= 0:
            raise uda.UDAError("MFSAN: hidden and kernels must be 1 or more, agreement not negative, factor positive.")
        self.hidden, self.agreement, self.kernels, self.factor = hidden, agreement, kernels, factor

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """A branch with its classifier for each source."""
        names = require_several(model, "MFSAN", "DAN, which is near to it for one source")
        put_heads(model, names, "MFSAN", hidden=self.hidden)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """MMD in each branch, and the gap of the classifiers."""
        heads, target = step.model.head, step.target.features
        mmds, logits = [], []
        for i, batch in enumerate(step.sources.values()):
            ours, theirs = heads.branch(i, batch.features), heads.branch(i, target)
            mmds.append(multi_kernel_mmd(ours, theirs, "biased", self.kernels, self.factor))
            logits.append(heads.classifiers[i][0](theirs))
        return {
            "mmd": self.scaled(step, torch.stack(mmds).mean()),
            "agreement": self.scaled(step, self.agreement * classifier_gap(logits, heads.known)),
        }
