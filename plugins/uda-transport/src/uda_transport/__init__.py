"""Optimal transport for uda."""

from uda_transport.classical import Transported, transport
from uda_transport.classifiers import COOTClassifier, UCOOTClassifier
from uda_transport.deepjdot import DeepJDOT
from uda_transport.heterogeneous import COOT, UCOOT
from uda_transport.jumbot import JUMBOT
from uda_transport.ktf import KTFClassifier
from uda_transport.minimax import DWGCSClassifier
from uda_transport.otda import OTDA
from uda_transport.reweigh import DoubleWeighting
from uda_transport.sinkhorn import Sinkhorn
from uda_transport.sliced import SlicedWasserstein
from uda_transport.transfer import KTF

__all__ = [
    "COOT", "JUMBOT", "KTF", "OTDA", "UCOOT", "COOTClassifier", "DWGCSClassifier", "DeepJDOT", "DoubleWeighting",
    "KTFClassifier", "Sinkhorn", "SlicedWasserstein", "Transported", "UCOOTClassifier", "transport",
]  # fmt: skip
