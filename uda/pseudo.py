"""Losses on pseudo-labels, as their weights and masks say."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from uda.losses import classification_loss, multi_label_loss
from uda.plugin import PseudoLabels
from uda.ranks import mean_over_ranks


def mean_of_kept(losses: Tensor, keep: Tensor) -> Tensor:
    """Mean of the losses ``[B]`` of the samples of a mask ``[B]``, 0 where there is none.

    Several processes divide by the mean number of their kept samples, so that each sample counts alike: all of them
    must call it.
    """
    kept = keep.to(losses.dtype)
    return (kept * losses).sum() / mean_over_ranks([kept.sum()])[0].clamp_min(1e-6)


def pseudo_cross_entropy(
    logits: Tensor, pseudo: PseudoLabels, mean: Literal["batch", "kept"] = "batch", multi_label: bool = False
) -> Tensor:
    """Cross-entropy on pseudo-labels, weighted and masked as they say, whoever gave them.

    ``sum_i m_i w_i CE(z_i, y_i) / n`` with ``m`` = ``keep``, ``w`` = ``weight``, and ``y`` the distribution ``soft``
    where there is one. ``n`` is the batch size B (FixMatch: Sohn et al. 2020, equation 4: few sure samples give a
    small loss) or, for ``mean="kept"``, the number of samples that are kept.

    Args:
        logits: ``[B, C]``; pseudo: labels of the same samples; multi_label: :func:`multi_label_loss` of ``soft``.
    """
    target = pseudo.y if pseudo.soft is None else pseudo.soft
    loss = multi_label_loss if multi_label else classification_loss
    losses = loss(logits, target, weight=pseudo.weight, reduction="none")
    if pseudo.keep is None:
        return losses.mean()
    return mean_of_kept(losses, pseudo.keep) if mean == "kept" else (losses * pseudo.keep.to(losses.dtype)).mean()
