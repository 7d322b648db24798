"""Test-time adaptation for uda."""

from uda_testtime.adacontrast import AdaContrast
from uda_testtime.adapter import Adapter
from uda_testtime.becotta import BECoTTA
from uda_testtime.core import Core
from uda_testtime.cotta import CoTTA
from uda_testtime.eata import EATA
from uda_testtime.lsa import LSA
from uda_testtime.memo import MEMO
from uda_testtime.method import Guard, Method
from uda_testtime.methods import LAME, TENT, BNStatistics, Source, lame
from uda_testtime.note import NOTE
from uda_testtime.petal import PETAL
from uda_testtime.plugin import TestTime
from uda_testtime.reliable import ETA, SAR
from uda_testtime.rmt import RMT
from uda_testtime.rna import RNA
from uda_testtime.roid import ROID
from uda_testtime.rotta import RoTTA
from uda_testtime.santa import SANTA
from uda_testtime.source import SourceSamples
from uda_testtime.vdp import VDP
from uda_testtime.vida import ViDA

__all__ = [
    "EATA", "ETA", "LAME", "LSA", "MEMO", "NOTE", "PETAL", "RMT", "RNA", "ROID", "SANTA", "SAR", "TENT", "VDP",
    "AdaContrast", "Adapter", "BECoTTA", "BNStatistics", "CoTTA", "Core", "Guard", "Method", "RoTTA", "Source",
    "SourceSamples", "TestTime", "ViDA", "lame",
]  # fmt: skip
