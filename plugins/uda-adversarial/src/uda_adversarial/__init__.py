"""Domain-adversarial alignment for uda."""

from uda_adversarial.cdan import CDAN
from uda_adversarial.dann import DANN

__all__ = ["CDAN", "DANN"]
