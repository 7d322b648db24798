"""What the discrepancies share: a weight with a ramp, and the features of both domains."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

import uda
from uda.nn import ramp as ramp_factor


class Discrepancy(uda.Plugin):
    """A distance between source and target; several sources are pooled.

    Args:
        weight: of the objective in the sum.
        ramp: growth of the weight over the run's progress p: ``none``, ``linear`` (p), ``warm_start``
            (2 / (1 + exp(-10 p)) - 1).
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 10.0, "log"), "ramp": ["none", "linear", "warm_start"],
    }  # fmt: skip

    def __init__(self, weight: float = 1.0, ramp: str = "none") -> None:
        super().__init__()
        if weight < 0:
            raise uda.UDAError(f"{type(self).__name__}: weight must not be negative, got {weight}.")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.ramp = weight, ramp

    def scaled(self, step: uda.Step, value: Tensor) -> Tensor:
        """The value times weight and ramp."""
        return self.weight * ramp_factor(self.ramp, step.progress) * value


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
