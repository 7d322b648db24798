"""Scores by name."""

from __future__ import annotations

from typing import Any

from uda.defaults import SCORE as DEFAULT_SCORE
from uda.selection.clusters import ClassClusters
from uda.selection.density import SoftNeighbourhoodDensity
from uda.selection.importance import DEV, IWV
from uda.selection.information import Diversity, InformationMaximisation, NegativeEntropy
from uda.selection.mixing import MixVal
from uda.selection.spectral import BNM, ClassCorrelation, RankMe
from uda.selection.transfer import TransferScore

#: Metric class of each score. ``reads`` says what it is made of, ``score`` is its pure form.
SCORES: dict[str, Any] = {
    "im": InformationMaximisation,
    "entropy": NegativeEntropy,
    "diversity": Diversity,
    "bnm": BNM,
    "corrc": ClassCorrelation,
    "snd": SoftNeighbourhoodDensity,
    "dev": DEV,
    "iwv": IWV,
    "rankme": RankMe,
    "class_cluster": ClassClusters,
    "transfer_score": TransferScore,
    "mixval": MixVal,
}

#: The one that chooses, and cheap ones from running sums beside it.
DEFAULT_SCORES = (DEFAULT_SCORE, "im", "entropy", "diversity", "bnm", "corrc")
