"""Domain-conditioned networks for uda."""

from uda_conditioned.dcan import DCAN
from uda_conditioned.gdcan import GDCAN

__all__ = ["DCAN", "GDCAN"]
