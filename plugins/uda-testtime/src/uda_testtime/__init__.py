"""Test-time adaptation for uda."""

from uda_testtime.adapter import Adapter, Guard, Method
from uda_testtime.methods import LAME, TENT, BNStatistics, Source, lame

__all__ = ["LAME", "TENT", "Adapter", "BNStatistics", "Guard", "Method", "Source", "lame"]
