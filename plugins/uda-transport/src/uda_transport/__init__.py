"""Optimal transport for uda."""

from uda_transport.deepjdot import DeepJDOT
from uda_transport.jumbot import JUMBOT
from uda_transport.sinkhorn import Sinkhorn
from uda_transport.sliced import SlicedWasserstein

__all__ = ["JUMBOT", "DeepJDOT", "Sinkhorn", "SlicedWasserstein"]
