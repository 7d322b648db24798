"""Global and local clustering (GLC: Qu et al., CVPR 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import no_autocast
from uda_sourcefree.universal import UniversalNeighbours


def cluster_means(x: Tensor, k: int, seed: int = 0) -> Tensor:
    """Centres ``[k, F]`` of k-means (one start, 100 iterations) on rows ``[n, F]``; all rows where there are fewer."""
    from sklearn.cluster import KMeans

    if len(x) <= k:
        return x
    found = KMeans(k, n_init=1, max_iter=100, random_state=seed).fit(x.double().cpu().numpy())
    return torch.as_tensor(found.cluster_centers_, dtype=x.dtype, device=x.device)


@torch.no_grad()
def one_against_all(features: Tensor, probs: Tensor, clusters: int, prior: float = 0.75) -> tuple[Tensor, Tensor]:
    """Class of each sample and whether it is unknown, by one-vs-all clustering of a whole target.

    For each class the ``N / clusters`` samples of largest probability give its prototype, k-means of the others
    ``clusters`` negative ones, all of length 1. The similarity to the prototype times
    ``(1 - prior) * mean probability of those samples + prior`` must exceed that to each negative one. A sample is
    unknown where this fails for the class of its nearest prototype.

    Args:
        features: ``[N, F]`` of length 1; probs: ``[N, C]``; clusters: number of target classes; prior: rho.

    Returns:
        Class ids ``[N]`` and a mask ``[N]``.
    """
    with no_autocast(features):
        n, classes = probs.shape
        number = max(1, n // clusters)
        order = probs.argsort(dim=0, descending=True, stable=True)
        positive = F.normalize(features[order[:number]].mean(0), dim=1)  # [C, F]
        similar = features @ positive.T
        label = similar.argmax(1)
        accepted = torch.zeros_like(label, dtype=torch.bool)
        for c in range(classes):  # once an epoch
            mine = label == c
            if not mine.any():
                continue
            strength = (1 - prior) * probs[order[:number, c], c].mean() + prior
            negative = F.normalize(cluster_means(features[order[number:, c]], clusters), dim=1)
            if not len(negative):
                accepted |= mine
                continue
            beyond = (features[mine] @ negative.T).max(1).values
            accepted[mine] = similar[mine, c] * strength > beyond
    return label, ~accepted


class GLC(UniversalNeighbours):
    """Labels by one-vs-all clustering of the whole target, smoothed by nearest neighbours; unknown by entropy.

    ``label_weight * CE(y^, p) + neighbour_weight * CE(mean of K neighbours' p, p)`` on the target alone, labels of
    :func:`one_against_all` at the start of each epoch, uniform where unknown. The classifier is frozen. The same for
    all label-set settings. Start from the source's model: ``model.init_from`` (label smoothing 0.1 on the source).

    Args:
        label_weight: published: 0.3 on Office-31 and VisDA, 1.5 on Office-Home and DomainNet.
        neighbour_weight: 1 in all published runs; neighbours: K, published: 4.
        prior: rho, 0.75 in all published runs.
        target_classes: clusters of the target, where they are known; None: by the silhouette, in the first epoch.
        shares: candidates for their number, as shares of the source's classes.
        tsne: count clusters on a t-SNE map, as published; False: on the features, in a tenth of the time, but worse.
        threshold: unknown above this entropy of the softmax over ``log C``; published: 0.55.
    """

    search_space: ClassVar[dict[str, Any]] = {"label_weight": (0.1, 2.0, "log"), "prior": [0.5, 0.75, 0.9]}

    def __init__(
        self,
        label_weight: float = 0.3,
        neighbour_weight: float = 1.0,
        neighbours: int = 4,
        prior: float = 0.75,
        target_classes: int | None = None,
        shares: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0),
        tsne: bool = True,
        threshold: float = 0.55,
    ) -> None:
        super().__init__(label_weight, neighbour_weight, neighbours, target_classes, shares, tsne, threshold)
        if not 0 <= prior <= 1:
            raise uda.UDAError(f"GLC: prior is in [0, 1], not {prior}.")
        self.prior = prior

    def labelled(self, model: uda.UDA, features: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By one-vs-all clustering, equal weights."""
        label, unknown = one_against_all(features, probs, int(self.clusters), self.prior)
        # k-means may round differently elsewhere; on the CPU, since a tensor is sent with its device
        label, unknown = model.trainer.strategy.broadcast((label.cpu(), unknown.cpu()))
        return label.to(features.device), unknown.to(features.device), torch.ones_like(features[:, 0])
