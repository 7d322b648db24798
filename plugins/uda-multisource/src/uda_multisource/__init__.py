"""Adaptation from several sources, with their data or without, for uda."""

from uda_multisource.caida import CAiDA
from uda_multisource.darn import DARN
from uda_multisource.decision import DECISION
from uda_multisource.landa import LanDA
from uda_multisource.m3sda import M3SDA
from uda_multisource.mdan import MDAN
from uda_multisource.mfsan import MFSAN
from uda_multisource.msfda import MSFDA
from uda_multisource.smuda import SMUDA
from uda_multisource.weights import SourceWeights

__all__ = ["DARN", "DECISION", "M3SDA", "MDAN", "MFSAN", "MSFDA", "SMUDA", "CAiDA", "LanDA", "SourceWeights"]
