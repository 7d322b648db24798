"""Deep Subdomain Adaptation Network for Image Classification (Zhu et al., TNNLS 2020)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.kernels import multi_kernel_mmd
from uda.losses import class_distributions
from uda.nn import full, no_autocast
from uda_discrepancy.base import KernelDiscrepancy

CLASSES = ("common", "all")


def local_mmd(
    source: Tensor,
    y: Tensor,
    target: Tensor,
    probs: Tensor,
    classes: str = "common",
    kernels: int = 5,
    factor: float = 2.0,
) -> Tensor:
    """MMD between the domains' samples of a class, mean over classes (LMMD; Zhu et al. 2020, equations 4 and 9).

    ``1/|K| sum_{c in K} |sum_i w^s_ic phi(s_i) - sum_j w^t_jc phi(t_j)|^2`` with the shares ``w_ic = p_ic /
    sum_j p_jc`` (equation 5), the biased estimate of the paper.

    Args:
        source: ``[n, F]`` with classes ``y`` ``[n]`` or distributions ``[n, C]``.
        target: ``[m, F]`` with class probabilities ``probs`` ``[m, C]``.
        classes: K: ``common``, the classes of a source sample that are also the most probable class of a target
            sample (the authors' code); ``all``: every class, C in number (the paper's text), where a class without a
            source sample adds nothing.
        kernels, factor: number of kernels and ratio of their variances.

    Returns:
        Scalar; 0 (with a graph) where no class is in K.
    """
    with no_autocast(source):
        probs = full(probs)
        on_source = class_distributions(y, probs.shape[1], probs.dtype)
        shared = on_source.sum(0) > 0
        if classes == "common":
            guessed = torch.zeros_like(shared).index_fill(0, probs.argmax(1), True)
            shared = shared & guessed
        of_class = multi_kernel_mmd(
            source, target, "biased", kernels, factor, source_weight=on_source.T, target_weight=probs.T
        )
        number = shared.sum().clamp_min(1) if classes == "common" else probs.shape[1]
        return (of_class * shared).sum() / number


class DSAN(KernelDiscrepancy):
    """Match the domains class by class (Zhu et al. 2020, equation 10).

    ``L = L_cls + weight * ramp(p) * LMMD``, with the source's labels and the target's predicted probabilities as
    weights. The published network has a linear bottleneck without normalisation.

    Args:
        weight: of the objective (authors' code: 0.5).
        classes: ``common`` (authors' code) or ``all``: see :func:`local_mmd`.
        soft_gradient: let the gradient flow into the target's probabilities, too (authors' code: no).
        ramp: ``warm_start`` is the paper's; here it follows the steps, not the epochs.
        others: as in :class:`~uda_discrepancy.base.KernelDiscrepancy`.
    """

    search_space: ClassVar[dict[str, Any]] = {**KernelDiscrepancy.search_space, "classes": list(CLASSES)}

    def __init__(
        self,
        weight: float = 0.5,
        classes: str = "common",
        soft_gradient: bool = False,
        kernels: int = 5,
        factor: float = 2.0,
        ramp: str = "warm_start",
    ) -> None:
        super().__init__(weight, kernels, factor, ramp)
        check_choice("DSAN", "classes", classes, CLASSES)
        self.classes, self.soft_gradient = classes, soft_gradient

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The local discrepancy."""
        logits = step.target.logits if self.soft_gradient else step.target.logits.detach()
        value = local_mmd(
            step.pooled("features"),
            step.pooled("y"),
            step.target.features,
            full(logits).softmax(1),
            self.classes,
            self.kernels,
            self.factor,
        )
        return {"lmmd": self.scaled(step, value)}
