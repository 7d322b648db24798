"""Batch Spectral Penalization (Chen et al., ICML 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.nn import full, no_autocast


def leading_energy(features: Tensor, k: int = 1) -> Tensor:
    """Sum of the ``k`` largest squared singular values of a batch of features ``[B, F]``, not centred.

    As eigenvalues of the smaller Gram matrix, float32: their gradient needs eigenvectors only and stays finite for
    equal or vanishing values.
    """
    with no_autocast(features):
        f = full(features)
        gram = f @ f.T if f.shape[0] <= f.shape[1] else f.T @ f
        return torch.linalg.eigvalsh(gram)[-k:].sum()


class BSP(uda.Plugin):
    """Keep a few directions from taking all of the feature space; an addition to DANN, CDAN and others.

    ``weight * (sum_{i<=k} sigma_i(f_s)^2 + sum_{i<=k} sigma_i(f_t)^2)`` of the batch matrices of either domain (Chen et
    al. 2019): adversarial alignment strengthens the directions of the largest singular values, which are
    the transferable ones, at the cost of the others, which tell classes apart.

    Args:
        weight: of the penalty. Squared singular values grow with the batch size and under DDP belong to the batch of
            one process, so that the weight is tied to it (published: 1e-4 to 2e-4 for 32 to 36 samples).
        k: number of singular values (1).
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (1e-5, 1e-3, "log"), "k": [1, 2]}

    def __init__(self, weight: float = 1e-4, k: int = 1) -> None:
        super().__init__()
        if weight < 0 or k < 1:
            raise uda.UDAError("BSP: weight must not be negative, and k must be 1 or more.")
        self.weight, self.k = weight, k

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The penalty of both domains."""
        energy = leading_energy(step.pooled("features"), self.k) + leading_energy(step.target.features, self.k)
        return {"spectral": self.weight * energy}
