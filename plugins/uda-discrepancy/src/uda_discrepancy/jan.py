"""Deep Transfer Learning with Joint Adaptation Networks (Long et al., ICML 2017)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.errors import check_choice
from uda.kernels import ESTIMATORS, adaptive_kernel, discrepancy, gaussian_kernel, squared_distances
from uda.nn import full, no_autocast, reverse_gradient
from uda_discrepancy.base import KernelDiscrepancy


def joint_mmd(
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    estimator: str = "unbiased",
    sigma: float = 0.92,
    kernels: int = 5,
    factor: float = 2.0,
) -> Tensor:
    """Joint MMD of features and class probabilities: the product of their kernels (Long et al. 2017, equation 9).

    Args:
        source: features ``[n, F]`` and probabilities ``[n, C]``; target: ``[m, F]`` and ``[m, C]``.
        estimator: see :func:`uda.kernels.discrepancy`.
        sigma: width of the single kernel ``exp(-D / (2 sigma^2))`` of the probabilities.
        kernels, factor: of the features' kernels, whose width follows the batch.
    """
    features, probs = (torch.cat(pair) for pair in zip(source, target, strict=True))
    on_probs = gaussian_kernel(squared_distances(probs), 2 * sigma**2, kernels=1)
    return discrepancy(adaptive_kernel(features, kernels, factor) * on_probs, len(source[0]), estimator)


class JAN(KernelDiscrepancy):
    """Match the joint distribution of features and predictions (Long et al. 2017, equations 9 to 12).

    ``L = L_cls + weight * JMMD^2((f_s, p_s), (f_t, p_t))`` with p the softmax, through which the gradient flows.

    Args:
        estimator: of the JMMD: ``unbiased`` (quadratic), ``linear`` (the paper), ``circular``, ``biased``.
        sigma: width of the kernel on the probabilities.
        adversarial: JAN-A: a linear map a layer, which starts as the identity, is trained to *maximise* the JMMD of
            what it gives (equation 12).
        lr_scale: learning rate of these maps relative to the head's.
        others: as in :class:`~uda_discrepancy.base.KernelDiscrepancy`.
    """

    search_space: ClassVar[dict[str, Any]] = {
        **KernelDiscrepancy.search_space, "estimator": ["linear", "unbiased"], "adversarial": [False, True],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        estimator: str = "unbiased",
        sigma: float = 0.92,
        adversarial: bool = False,
        lr_scale: float = 0.1,
        kernels: int = 5,
        factor: float = 2.0,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, kernels, factor, ramp)
        check_choice("JAN", "estimator", estimator, ESTIMATORS)
        if sigma <= 0:
            raise uda.UDAError(f"JAN: sigma must be positive, got {sigma}.")
        self.estimator, self.sigma, self.adversarial, self.lr_scale = estimator, sigma, adversarial, lr_scale
        self.maps: nn.ModuleList | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The maps of JAN-A, at the identity."""
        if self.adversarial and self.maps is None:
            self.maps = nn.ModuleList(nn.Linear(d, d) for d in (model.feature_dim, model.num_classes))
            for layer in self.maps:
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The maps at their own rate."""
        if self.maps is None:
            return []
        return [{"name": self.key, "params": self.maps.parameters(), "lr_scale": self.lr_scale}]

    def layers(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, F]`` and probabilities ``[B, C]``, mapped where JAN is adversarial."""
        with no_autocast(features):
            pair = (full(features), full(logits).softmax(1))
            if self.maps is None:
                return pair
            # two reversals: the map ascends, and what reaches the layer keeps its sign
            first, second = (reverse_gradient(m(reverse_gradient(x))) for m, x in zip(self.maps, pair, strict=True))
            return first, second

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The joint discrepancy."""
        source = self.layers(step.pooled("features"), step.pooled("logits"))
        target = self.layers(step.target.features, step.target.logits)
        value = joint_mmd(source, target, self.estimator, self.sigma, self.kernels, self.factor)
        return {"jmmd": self.scaled(step, value)}
