"""Learning from labels some of which are wrong: negative learning, then selective, then positive (NLNL)."""

from __future__ import annotations

import torch
from torch import Tensor

from uda.nn import full, no_autocast


def other_labels(y: Tensor, classes: int) -> Tensor:
    """For each label ``[B]`` another class, each with equal chance, from torch's own random numbers."""
    return (y + torch.randint(1, classes, y.shape).to(y.device)) % classes


def selected_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over the kept entries ``[B]``; 0, with a gradient of 0, where none is kept."""
    return (values * keep).sum() / keep.sum().clamp_min(1)


def noisy_label_loss(logits: Tensor, y: Tensor, other: Tensor, phase: str, threshold: float = 0.5) -> Tensor:
    """One of the three phases of NLNL (Kim et al., ICCV 2019), mean over the samples that take part.

    ``negative``: ``-log(1 - p_other)`` of all; ``selective``: of those with ``p_y > 1 / C``; ``positive``:
    ``-log p_y`` of those with ``p_y > threshold``. As in the authors' code ``1 - p_other`` is at least 1e-5: below,
    there is no gradient.

    Args:
        logits: ``[B, C]``; y: labels ``[B]``; other: complementary labels ``[B]``.
    """
    with no_autocast(logits):
        log_p = full(logits).log_softmax(1)
        own = log_p.gather(1, y[:, None])[:, 0]
        sure = own.detach().exp()
        if phase == "positive":
            return selected_mean(-own, (sure > threshold).to(log_p))
        wrong = log_p.gather(1, other[:, None])[:, 0].exp()
        negative = -torch.log1p(-wrong.clamp(max=1 - 1e-5))
        every = torch.ones_like(sure)
        return selected_mean(negative, every if phase == "negative" else (sure > 1 / logits.shape[1]).to(log_p))


def phase_of(progress: float, phases: tuple[float, float]) -> str:
    """Which phase a share of the training belongs to."""
    return "negative" if progress < phases[0] else "selective" if progress < phases[1] else "positive"
