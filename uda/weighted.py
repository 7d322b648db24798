"""The base of methods that are one objective: a weight, and how it grows over the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from uda.errors import UDAError
from uda.nn import ramp as ramp_factor
from uda.plugin import Plugin

if TYPE_CHECKING:
    from torch import Tensor

    from uda.step import Step


class Weighted(Plugin):
    """An objective with a weight.

    Args:
        weight: of the objective in the sum.
        ramp: growth of the weight over the run's progress p: ``none``, ``linear`` (p), ``warm_start``
            (2 / (1 + exp(-10 p)) - 1).
    """

    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 10.0, "log"), "ramp": ["none", "linear", "warm_start"],
    }  # fmt: skip

    def __init__(self, weight: float = 1.0, ramp: str = "none") -> None:
        super().__init__()
        if weight < 0:
            raise UDAError(f"{type(self).__name__}: weight must not be negative, got {weight}.")
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.ramp = weight, ramp

    def scaled(self, step: Step, value: Tensor) -> Tensor:
        """The value times weight and ramp."""
        return self.weight * ramp_factor(self.ramp, step.progress) * value
