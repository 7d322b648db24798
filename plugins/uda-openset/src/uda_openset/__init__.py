"""Open-set adaptation for uda: the target has classes that the source lacks."""

from uda_openset.osbp import OSBP

__all__ = ["OSBP"]
