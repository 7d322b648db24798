"""Partial adaptation for uda: the target has only some of the source's classes."""

from uda_partial.ba3us import BA3US
from uda_partial.pada import PADA
from uda_partial.san import SAN
from uda_partial.weights import ClassWeights

__all__ = ["BA3US", "PADA", "SAN", "ClassWeights"]
