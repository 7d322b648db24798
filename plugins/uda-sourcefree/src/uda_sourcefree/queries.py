"""Which unlabelled samples to ask about: scores and selections of active learning.

Scores ``[N]`` ask for the smallest; selections give rows of their own. All are of unlabelled samples with class
probabilities ``[N, C]`` and features ``[N, F]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uda.nn import full, no_autocast


def contrastive_scores(
    probs: Tensor, before: Tensor | None, strength: float = 0.03, confident: int = 100, balance: float = 0.1
) -> Tensor:
    """Scores ``[N]`` of contrastive active sampling (LFTL: Lyu et al., ECCV 2024).

    ``q = p + strength (p - p_before)`` has margin ``q_(1) - q_(2)``, divided by its maximum. Classes that are frequent
    among the ``confident`` samples of largest margin (frequency over its maximum, times ``balance``) come last.

    Args:
        probs: of the model as it is now ``[N, C]``; before: of the round before ``[N, C]``; None in the first round.
    """
    q = probs if before is None else probs + strength * (probs - before)
    top = q.topk(2, dim=1).values
    margin = top[:, 0] - top[:, 1]
    label = probs.argmax(1)
    sure = margin.topk(min(confident, len(margin))).indices
    counts = torch.bincount(label[sure], minlength=probs.shape[1]).to(margin.dtype)
    return margin / margin.max().clamp_min(1e-12) + balance * (counts / counts.max())[label]


def entropies(probs: Tensor) -> Tensor:
    """Entropy of class probabilities ``[N, C]`` in nats, ``[N]``."""
    return -torch.xlogy(probs, probs).sum(1)


def badge(probs: Tensor, features: Tensor, number: int, generator: torch.Generator | None = None) -> Tensor:
    """Rows ``[number]`` by k-means++ on the gradients that their own predictions would give (BADGE: Ash et al., 2020).

    The gradient of a linear classifier's cross-entropy with the predicted label is ``(p - one-hot) f^T``: large where
    the model is unsure, and in another direction for another class or other features. The first row has the largest;
    each further one is drawn with probability proportional to its squared distance from the nearest of those before.
    Products of such gradients are products of the two factors', so that no ``[N, C F]`` is made.
    """
    with no_autocast(features):
        f, error = full(features).cpu().double(), full(probs).cpu().double()  # the same draws on any hardware
        error = error - torch.nn.functional.one_hot(error.argmax(1), error.shape[1])
        square = error.square().sum(1) * f.square().sum(1)
        taken = [int(square.argmax())]
        gap = torch.full_like(square, torch.inf)
        for _ in range(number - 1):
            last = taken[-1]
            distance = square + square[last] - 2 * (error @ error[last]) * (f @ f[last])
            gap = torch.minimum(gap, distance.clamp(min=0))
            gap[taken] = 0
            chance = gap if bool(gap.sum() > 0) else _others(gap, taken)
            taken.append(int(torch.multinomial(chance, 1, generator=generator)))
        return torch.tensor(taken, device=features.device)


def k_centre(features: Tensor, known: Tensor, number: int) -> Tensor:
    """Rows ``[number]``, each the farthest from all before and from ``known`` (core-set: Sener and Savarese, 2018).

    Args:
        features: ``[N, F]``; known: features of labelled samples ``[n, F]``; with none the first row is the one nearest
            to the mean.
    """
    with no_autocast(features):
        f = full(features)
        if len(known):
            gap, taken = torch.cdist(f, full(known)).amin(1), []
        else:
            taken = [int((f - f.mean(0)).square().sum(1).argmin())]
            gap = (f - f[taken[0]]).norm(dim=1)
        while len(taken) < number:
            gap[taken] = -1
            taken.append(int(gap.argmax()))
            gap = torch.minimum(gap, (f - f[taken[-1]]).norm(dim=1))
        return torch.tensor(taken, device=features.device)


def clue(probs: Tensor, features: Tensor, number: int, seed: int = 0) -> Tensor:
    """Rows ``[number]`` nearest to the centres of k-means, weighed by entropy (CLUE: Prabhu et al., ICCV 2021).

    ``number`` clusters of the features, in which a sample counts with the entropy of its prediction: unsure samples
    draw the centres, and no two are in one place. Of each centre the nearest row that no centre before it has.
    """
    from sklearn.cluster import KMeans

    f = full(features).cpu().numpy()
    weight = entropies(full(probs)).clamp(min=1e-8).cpu().numpy()
    means = KMeans(number, n_init=1, random_state=seed).fit(f, sample_weight=weight)
    gap = torch.as_tensor(means.transform(f))
    taken = []
    for c in range(number):
        row = int(gap[:, c].argmin())
        gap[row] = torch.inf
        taken.append(row)
    return torch.tensor(taken, device=features.device)


def _others(like: Tensor, taken: list[int]) -> Tensor:
    """1 for each row that is not taken."""
    out = torch.ones_like(like)
    out[taken] = 0
    return out
