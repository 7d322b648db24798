"""Self-training and classifier refinement for uda."""

from uda_selftraining.atdoc import ATDOC
from uda_selftraining.bnm import BNM
from uda_selftraining.entropy import EntropyMinimisation
from uda_selftraining.fixmatch import FixMatch
from uda_selftraining.get import GeT
from uda_selftraining.jigsaw import Jigsaw
from uda_selftraining.mcc import MCC
from uda_selftraining.mean_teacher import MeanTeacher
from uda_selftraining.pseudo_label import PseudoLabel, SelfTraining
from uda_selftraining.rotation import Rotation

__all__ = [
    "ATDOC",
    "BNM",
    "MCC",
    "EntropyMinimisation",
    "FixMatch",
    "GeT",
    "Jigsaw",
    "MeanTeacher",
    "PseudoLabel",
    "Rotation",
    "SelfTraining",
]
