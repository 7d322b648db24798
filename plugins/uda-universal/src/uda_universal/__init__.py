"""Open-set and universal adaptation for uda: either domain may have classes of its own."""

from uda_universal.dance import DANCE
from uda_universal.dcc import DCC
from uda_universal.ovanet import OVANet

__all__ = ["DANCE", "DCC", "OVANet"]
