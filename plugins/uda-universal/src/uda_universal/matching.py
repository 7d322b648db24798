"""Clusters of the target against classes of the source: mutual nearest pairs, and how many clusters agree best.

What Li et al. (Domain Consensus Clustering, CVPR 2021) do between two stages of training, as functions. All
similarities are cosines; those of whole domains are taken in chunks of rows.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 4096


def nearest(features: Tensor, centres: Tensor, rows: int = ROWS) -> Tensor:
    """Centre of the largest cosine ``[N]`` of features ``[N, F]`` among centres ``[K, F]``, ``rows`` at a time."""
    centres = F.normalize(centres.float(), dim=1).T
    return torch.cat([(part.float() @ centres).argmax(1) for part in features.split(rows)])


def unit_centres(features: Tensor, y: Tensor, classes: int) -> Tensor:
    """Mean direction of each class ``[C, F]``, float32, from unit rows ``[N, F]``; zero for a class of none."""
    sums = features.new_zeros(classes, features.shape[1], dtype=torch.float32).index_add_(0, y, features.float())
    return F.normalize(sums, dim=1)


def mutual_pairs(source: Tensor, target: Tensor) -> Tensor:
    """Class of each cluster where the two are each other's nearest, -1 where not: ``[C, F]``, ``[K, F]`` -> ``[K]``.

    At least one pair is mutual: that of the largest cosine.
    """
    cosine = F.normalize(source.float(), dim=1) @ F.normalize(target.float(), dim=1).T
    of_class, of_cluster = cosine.argmax(1), cosine.argmax(0)
    mutual = of_class[of_cluster] == torch.arange(len(target), device=target.device)
    return torch.where(mutual, of_cluster, -1)


def consensus_scores(
    source: Tensor, y: Tensor, classes: Tensor, target: Tensor, code: Tensor, centres: Tensor, partner: Tensor
) -> Tensor:
    """Consensus of each matched pair (c, k) ``[pairs]``, in the order of the clusters (Li et al. 2021, section 3.2).

    Half the share of the samples of class c whose nearest cluster is k, and half that of the samples of cluster k whose
    nearest class is c.

    Args:
        source: ``[N, F]`` of classes ``y`` ``[N]``; classes: their centres ``[C, F]``.
        target: ``[M, F]`` of clusters ``code`` ``[M]``; centres: ``[K, F]``; partner: :func:`mutual_pairs` ``[K]``.
    """
    k = torch.nonzero(partner >= 0)[:, 0]
    c = partner[k]
    to_cluster, to_class = nearest(source, centres), nearest(target, classes)

    def share(of: Tensor, members: Tensor, got: Tensor, wanted: Tensor, count: int) -> Tensor:
        """Per pair: how many of the members of ``of`` got ``wanted``."""
        agreed = torch.zeros(count, len(centres) + len(classes), device=got.device)
        agreed.index_put_((members, got), torch.ones(len(got), device=got.device), accumulate=True)
        return agreed[of, wanted] / agreed[of].sum(1).clamp_min(1)

    return (share(c, y, to_cluster, k, len(classes)) + share(k, code, to_class, c, len(centres))) / 2


@dataclass(frozen=True)
class Matching:
    """The target's clusters, and the class that each is matched with.

    Attributes:
        centres: ``[K, F]`` of unit length; code: cluster of each target sample ``[M]``; partner: class of each cluster
            ``[K]``, -1 for none (a class of the target alone); score: mean consensus of the pairs.
        scores: of all numbers of clusters that were tried.
    """

    centres: Tensor
    code: Tensor
    partner: Tensor
    score: float
    scores: dict[int, float]

    @property
    def clusters(self) -> int:
        """K."""
        return len(self.centres)


def candidates(first: int, step: int, last: int) -> Iterator[int]:
    """Numbers of clusters from ``first`` by ``step`` to at most ``last``, at least one."""
    yield from range(min(max(first, 1), last), last + 1, max(step, 1))


def match(
    source: Tensor,
    y: Tensor,
    target: Tensor,
    classes: int,
    numbers: Iterator[int] | list[int],
    start: Tensor | None = None,
    falls: int = 4,
    starts: int = 1,
    min_samples: int = 0,
    seed: int = 0,
) -> Matching:
    """Cluster the target by k-means for several numbers of clusters, and keep the number of the best consensus.

    Args:
        source: features ``[N, F]`` of classes ``y`` ``[N]``; target: ``[M, F]``. All are scaled to unit length.
        classes: C; numbers: of clusters to try, rising.
        start: first centres ``[K, F]``, for one number alone.
        falls: stop after so many falls of the score in a row; 0: never.
        starts: of k-means; seed: of its draws.
        min_samples: a matched cluster of no more samples is matched with none.
    """
    source, target = (F.normalize(v.float(), dim=1) for v in (source, target))
    centres_s = unit_centres(source, y, classes)
    present = torch.bincount(y, minlength=classes) > 0
    centres_s = centres_s[present]
    named = torch.nonzero(present)[:, 0]
    row = torch.cumsum(present, 0) - 1
    best: Matching | None = None
    scores: dict[int, float] = {}
    fallen, last = 0, -1.0
    for number in numbers:
        centres, code = kmeans(target, number, start, starts, seed)
        partner = mutual_pairs(centres_s, centres)
        score = float(consensus_scores(source, row[y], centres_s, target, code, centres, partner).mean())
        scores[number] = score
        if best is None or score > best.score:
            best = Matching(centres, code, partner, score, scores)
        fallen = fallen + 1 if score < last else 0
        last = score
        if falls and fallen >= falls:
            break
    small = torch.bincount(best.code, minlength=best.clusters) <= min_samples
    partner = torch.where(small | (best.partner < 0), -1, named[best.partner.clamp_min(0)])
    return Matching(best.centres, best.code, partner, best.score, scores)


def kmeans(
    unit: Tensor, number: int, start: Tensor | None = None, starts: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """k-means of unit rows ``[M, F]``: centres ``[K, F]`` of unit length, and the cluster of each row ``[M]``."""
    from sklearn.cluster import KMeans

    first = "k-means++" if start is None else start.float().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fewer distinct rows than clusters: empty clusters stay unmatched
        found = KMeans(number, init=first, n_init=1 if start is not None else starts, random_state=seed).fit(
            unit.cpu().numpy()
        )
    centres = F.normalize(torch.from_numpy(found.cluster_centers_).to(unit), dim=1)
    return centres, torch.from_numpy(found.labels_).to(unit.device, torch.long)
