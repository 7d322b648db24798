"""Open-set and universal adaptation for uda: either domain may have classes of its own."""

from uda_universal.cmu import CMU
from uda_universal.dance import DANCE
from uda_universal.dcc import DCC
from uda_universal.memspm import MemSPM
from uda_universal.mlnet import MLNet
from uda_universal.ovanet import OVANet
from uda_universal.ppot import PPOT
from uda_universal.uan import UAN
from uda_universal.uniam import UniAM
from uda_universal.uniot import UniOT

__all__ = ["CMU", "DANCE", "DCC", "PPOT", "UAN", "MLNet", "MemSPM", "OVANet", "UniAM", "UniOT"]
