"""ROID: certain and diverse samples, weights drawn back to the source, and a correction by the batch's prior."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError
from uda.losses import entropy
from uda.nn import full, no_autocast
from uda_testtime.adapter import Adapter
from uda_testtime.methods import TENT
from uda_testtime.parts import colour_view, keep_start, symmetric_cross_entropy


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99, eps: float = 1e-5) -> Tensor:
    """``-sum_c p_c log(p_c / (1 - p_c) + eps)`` of ``[B, C]``, ``[B]``, p at most ``clip`` (ROID, eq. 3)."""
    with no_autocast(logits):
        p = full(logits).softmax(1).clamp_max(clip)
        return -(p * (p / (1 - p) + eps).log()).sum(1)


def _unit(x: Tensor) -> Tensor:
    """Scaled to [0, 1]; zeros where all are equal, as in a batch of one."""
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else torch.zeros_like(x)


@torch.no_grad()
def certainty_diversity(logits: Tensor, prior: Tensor, temperature: float = 1 / 3) -> tuple[Tensor, Tensor]:
    """Weights ``[B]`` and which samples are kept ``[B]`` (ROID, eq. 4 to 6).

    Args:
        logits: ``[B, C]``; prior: moving average of predictions ``[C]``; temperature: of the weights.

    Returns:
        ``exp(div * cert / temperature)`` with ``div = 1 - cos(p, prior)`` and ``cert = -H(p)``, each scaled to [0, 1]
        over the batch; samples of less than mean diversity are left out with weight 0. Equal values weigh 1.
    """
    with no_autocast(logits):
        p = full(logits).softmax(1)
        diverse = _unit(1 - F.cosine_similarity(p, prior[None], dim=1))
        keep = diverse >= diverse.mean()
        return (diverse * _unit(-entropy(logits)) / temperature).exp() * keep, keep


@torch.no_grad()
def smoothed_prior(logits: Tensor) -> Tensor:
    """Mean prediction ``[C]`` of a batch, smoothed (ROID, eq. 9): ``(prior + s) / (1 + s C)``.

    ``s = max(1/B, 1/C) / max(prior)``: small or even batches correct little.
    """
    with no_autocast(logits):
        prior = full(logits).softmax(1).mean(0)
        b, c = logits.shape
        s = max(1 / b, 1 / c) / prior.max()
        return (prior + s) / (1 + s * c)


class ROID(TENT):
    """Weighted self-training with weight ensembling and prior correction (Marsden et al., WACV 2024).

    Scored: the logits before the update, corrected by the prior of their batch. With ``lr=0`` and
    ``correction="none"`` that is :class:`~uda_testtime.BNStatistics`.

    Args:
        lr, optimizer, source_weight: as in :class:`TENT` (Adam 1e-3 CIFAR-C, SGD 2.5e-4 ImageNet-C).
        weight: of the loss; consistency: of its part between a sample and its view; 0: no view.
        momentum: share of the weights that stays, the rest is the source's after each step; 1: no ensembling.
        prior_momentum: of the average of predictions; temperature: of the weights.
        correction: ``probs`` multiplies probabilities by the prior; ``logits`` multiplies raw logits, as the authors'
            code does, which lowers a frequent class where its logit is negative; ``none``.
        flip: views may be mirrored.
    """

    scored = "before the update, corrected"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, source_weight: float = 0.0,
        consistency: float = 1.0, momentum: float = 0.99, prior_momentum: float = 0.9, temperature: float = 1 / 3,
        correction: Literal["probs", "logits", "none"] = "probs", flip: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight)
        if correction not in ("probs", "logits", "none"):
            raise UDAError(f"ROID: correction is 'probs', 'logits' or 'none', not {correction!r}.")
        self.consistency, self.momentum, self.prior_momentum = consistency, momentum, prior_momentum
        self.temperature, self.correction, self.flip = temperature, correction, flip

    def attach(self, a: Adapter) -> None:
        """As TENT, with a copy of the start."""
        super().attach(a)
        keep_start(a)

    def corrected(self, logits: Tensor) -> Tensor:
        """Logits that count."""
        if self.correction == "none":
            return logits
        prior = smoothed_prior(logits)
        return logits * prior if self.correction == "logits" else full(logits).log_softmax(1) + prior.log()

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """Corrected logits."""
        return self.corrected(a.net(x))

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, one step on the weighted samples, and a little of the way back to the source."""
        logits, n = a.net(x), len(x)
        p = full(logits.detach()).softmax(1)
        prior = a.state.get("prior", torch.full_like(p[0], 1 / p.shape[1]))
        w, keep = certainty_diversity(logits.detach(), prior, self.temperature)
        a.state["prior"] = self.prior_momentum * prior + (1 - self.prior_momentum) * p.mean(0)
        loss = (w * soft_likelihood_ratio(logits)).sum() / n
        if self.consistency:
            view = a.net(colour_view(a, x[keep], self.flip, blur=False, noise=0.0, padding="reflect"))
            both = symmetric_cross_entropy(view, logits[keep])
            loss = loss + self.consistency * (w[keep] * both).sum() / n
        a.update(self.weight * loss)
        with torch.no_grad():
            for q, start in zip(a.parameters, a.extra["start"], strict=True):
                q.lerp_(start, 1 - self.momentum)
        return self.corrected(logits.detach())
