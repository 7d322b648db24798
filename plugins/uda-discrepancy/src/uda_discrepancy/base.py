"""What the discrepancies share: a weight with a ramp, and the features of both domains."""

from __future__ import annotations

import uda
from uda.weighted import Weighted


class Discrepancy(Weighted):
    """A distance between source and target; several sources are pooled.

    Args:
        weight, ramp: as in :class:`~uda.weighted.Weighted`.
    """

    settings = ("closed", "multi-source")


class KernelDiscrepancy(Discrepancy):
    """A discrepancy with several Gaussian kernels.

    Args:
        kernels: number of Gaussian kernels.
        factor: ratio of their variances.
        weight, ramp: as in :class:`Discrepancy`.
    """

    def __init__(self, weight: float = 1.0, kernels: int = 5, factor: float = 2.0, ramp: str = "none") -> None:
        super().__init__(weight, ramp)
        if kernels < 1 or factor <= 0:
            raise uda.UDAError(f"{type(self).__name__}: kernels must be 1 or more, and factor must be positive.")
        self.kernels, self.factor = kernels, factor
