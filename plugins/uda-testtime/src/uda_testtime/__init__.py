"""Test-time adaptation for uda."""

from uda_testtime.adapter import Adapter
from uda_testtime.method import Guard, Method
from uda_testtime.methods import LAME, TENT, BNStatistics, Source, lame
from uda_testtime.plugin import TestTime
from uda_testtime.reliable import ETA, SAR
from uda_testtime.source import SourceSamples

__all__ = [
    "ETA", "LAME", "SAR", "TENT", "Adapter", "BNStatistics", "Guard", "Method", "Source", "SourceSamples", "TestTime",
    "lame",
]  # fmt: skip
