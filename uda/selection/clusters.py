"""Agreement of the target's own clusters with its predictions."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from uda.errors import UDAError
from uda.selection.pool import PoolScore, ScorePool


def class_clusters(features: Tensor, logits: Tensor) -> Tensor:
    """Adjusted mutual information of k-means clusters and predicted classes; about 0 to 1.

    Features ``[N, F]``, logits ``[N, C]``. k-means with C clusters starts at the mean features of the
    predicted classes, and at the origin for a class that is never predicted (Robbiano et al. 2022, as in
    their code); so nothing is drawn. A single predicted class gives 0, and so do fewer samples than classes.
    ClassAMI of Musgrave et al. (2022) starts at random by default. Fails where features cluster well but
    under wrong names, and rises with any self-training.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_mutual_info_score

    if len(features) != len(logits):
        raise UDAError(f"class_clusters got {len(features)} rows of features and {len(logits)} of logits.")
    classes = logits.shape[1]
    labels = logits.argmax(1).cpu().numpy()
    if len(np.unique(labels)) < 2 or len(labels) < classes:
        return torch.zeros((), dtype=torch.float64)
    x = features.detach().cpu().double().numpy()
    start = np.zeros((classes, x.shape[1]))
    for c in np.unique(labels):
        start[c] = x[labels == c].mean(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters: the score is low, as it should be
        found = KMeans(classes, init=start, n_init=1, algorithm="lloyd").fit_predict(x)
    return torch.tensor(float(adjusted_mutual_info_score(labels, found)), dtype=torch.float64)


class ClassClusters(PoolScore):
    """Metric form of :func:`class_clusters`."""

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool."""
        return class_clusters(pool.target_features, pool.target_logits)
