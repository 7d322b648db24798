"""Label-free model selection: scores of target predictions that need no target label. Larger is better."""

from __future__ import annotations

from uda.selection.choose import VOTERS, monitor_value, needed_scores, running_choice, select_epoch, vote
from uda.selection.clusters import ClassClusters, class_clusters
from uda.selection.density import SoftNeighbourhoodDensity, soft_neighbourhood_density
from uda.selection.guard import Collapse, CollapseGuard, collapse
from uda.selection.importance import DEV, IWV, cross_fitted_weights, density_ratio, dev, iwv
from uda.selection.information import (
    Diversity,
    InformationMaximisation,
    NegativeEntropy,
    diversity,
    information_maximisation,
    negative_entropy,
)
from uda.selection.mixing import MixVal, mixval
from uda.selection.pool import ScorePool
from uda.selection.registry import DEFAULT_SCORES, SCORES
from uda.selection.spectral import (
    BNM,
    ClassCorrelation,
    RankMe,
    bnm,
    class_correlation,
    effective_rank,
    rankme,
)
from uda.selection.sums import PredictionSums, Sums
from uda.selection.transfer import TransferScore, classifier_unevenness, hopkins, transfer_score

__all__ = [
    "BNM", "DEFAULT_SCORES", "DEV", "IWV", "SCORES", "VOTERS", "ClassClusters", "ClassCorrelation",
    "Collapse", "CollapseGuard", "Diversity", "InformationMaximisation", "MixVal", "NegativeEntropy",
    "PredictionSums", "RankMe", "ScorePool", "SoftNeighbourhoodDensity", "Sums", "TransferScore", "bnm",
    "class_clusters", "class_correlation", "classifier_unevenness", "collapse", "cross_fitted_weights",
    "density_ratio", "dev", "diversity", "effective_rank", "hopkins", "information_maximisation", "iwv",
    "mixval", "monitor_value", "needed_scores", "negative_entropy", "rankme", "running_choice",
    "select_epoch", "soft_neighbourhood_density", "transfer_score", "vote",
]  # fmt: skip
