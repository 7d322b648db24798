"""Whether the target-private classes can be told apart: clusters of their features, and the H3-score."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from uda.metrics.counts import ConfusionMetric, h3_score


def private_nmi(features: Tensor, y: Tensor, seed: int = 0, starts: int = 5) -> Tensor:
    """Normalised mutual information of k-means clusters and classes, over samples of the target-private classes.

    Features are normalised to length one, and there are as many clusters as classes, as in Chang et al. (UniOT, NeurIPS
    2022; their code takes spherical k-means with five starts). Normalised by the arithmetic mean of the entropies.

    Args:
        features: ``[N, F]``; ``y``: their classes ``[N]``, which are all target-private.
        seed: of the starts; ``starts``: the best of these many.

    Returns:
        A scalar, float64; NaN without a sample or where a feature is not finite, 1 for a single class.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    if not len(y) or not bool(features.isfinite().all()):
        return torch.full((), torch.nan, dtype=torch.float64)
    classes = len(y.unique())
    x = torch.nn.functional.normalize(features.detach().double(), dim=1).cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct points than clusters: the score is low, as it should be
        found = KMeans(classes, n_init=starts, random_state=seed).fit_predict(x)
    return torch.tensor(float(normalized_mutual_info_score(y.cpu().numpy(), found)), dtype=torch.float64)


class H3Score(ConfusionMetric):
    """:func:`~uda.metrics.counts.h3_score` with class means; keeps the features of the target-private samples.

    Args:
        num_classes: C, the classes of the source.
        seed: of k-means.
    """

    def __init__(self, num_classes: int, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.seed = seed
        for name in ("features", "private"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, label: Tensor, y: Tensor, features: Tensor, unknown: Tensor | None = None) -> None:  # type: ignore[override]
        """Predictions ``[B]``, truth ``[B]`` (an id for each target-private class), features ``[B, F]``."""
        super().update(label, y, unknown)
        rows = y >= self.num_classes
        self.features.append(features[rows].detach().float())
        self.private.append(y[rows])

    def compute(self) -> Tensor:
        """A scalar in [0, 1], NaN where there is no target-private sample."""
        nmi = private_nmi(dim_zero_cat(self.features), dim_zero_cat(self.private), self.seed)
        return h3_score(self.confusion, nmi)
