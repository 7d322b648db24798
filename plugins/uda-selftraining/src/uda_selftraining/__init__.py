"""Self-training and classifier refinement for uda."""

from uda_selftraining.entropy import EntropyMinimisation
from uda_selftraining.mcc import MCC

__all__ = ["MCC", "EntropyMinimisation"]
