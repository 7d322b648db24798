"""Domain-adversarial alignment for uda."""

from uda_adversarial.adda import ADDA
from uda_adversarial.bsp import BSP
from uda_adversarial.cdan import CDAN
from uda_adversarial.dann import DANN
from uda_adversarial.mcd import MCD, MCDPhases
from uda_adversarial.mdd import MDD
from uda_adversarial.sdat import SDAT
from uda_adversarial.toalign import ToAlign

__all__ = ["ADDA", "BSP", "CDAN", "DANN", "MCD", "MDD", "SDAT", "MCDPhases", "ToAlign"]
