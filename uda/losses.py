"""Losses as pure functions. ``B`` samples, ``C`` classes, ``F`` features.

The losses are computed in float32 (float64 for float64 inputs) with autocast off: logarithms of means and
products of probabilities lose too much in half precision. The maps that join features and predictions follow
the precision around them.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn.precision import full, no_autocast
from uda.ranks import of_all_ranks

Reduction = Literal["mean", "none"]


def classification_loss(
    logits: Tensor,
    y: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Cross-entropy for class ids or distributions.

    Args:
        logits: ``[B, C]``.
        y: class ids ``[B]`` (integers) or distributions ``[B, C]``.
        label_smoothing: e in ``(1 - e) y + e / C`` (Szegedy et al., 2016).
        weight: weight of each *sample* ``[B]``. The mean is over all B samples, as in FixMatch: a sample of
            weight zero counts.
        reduction: ``"mean"`` for a scalar, ``"none"`` for ``[B]``.
    """
    if y.ndim == 2 and y.shape != logits.shape:
        raise UDAError(f"Soft labels have shape {tuple(y.shape)} but the logits {tuple(logits.shape)}.")
    with no_autocast(logits):
        logits = full(logits)
        y = y.to(logits.dtype) if y.ndim == 2 else y.long()
        loss = F.cross_entropy(logits, y, label_smoothing=label_smoothing, reduction="none")
        if weight is not None:
            loss = _same_shape(weight, loss) * loss
    return loss.mean() if reduction == "mean" else loss


def multi_label_loss(
    logits: Tensor,
    y: Tensor,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Binary cross-entropy of each class, mean over the classes; the rest as in :func:`classification_loss`.

    Args:
        logits: ``[B, C]``.
        y: in [0, 1], ``[B, C]``: whether a sample has the class.
        label_smoothing: e in ``(1 - e) y + e / 2``.
    """
    if y.shape != logits.shape:
        raise UDAError(f"Multi-label targets have shape {tuple(y.shape)} but the logits {tuple(logits.shape)}.")
    with no_autocast(logits):
        logits = full(logits)
        y = (1 - label_smoothing) * y.to(logits.dtype) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)
        if weight is not None:
            loss = _same_shape(weight, loss) * loss
    return loss.mean() if reduction == "mean" else loss


def class_distributions(y: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class ids ``[B]`` as one-hot rows ``[B, C]``; distributions ``[B, C]`` as they are."""
    return (F.one_hot(y.long(), classes) if y.ndim == 1 else y).to(dtype)


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """``-sum_c t_c log p_c`` for distributions ``targets`` ``[B, C]``; see :func:`classification_loss`."""
    if targets.ndim != 2:
        raise UDAError(
            f"soft_cross_entropy takes distributions [B, C], not a tensor of shape {tuple(targets.shape)}."
        )
    return classification_loss(logits, targets, label_smoothing, weight, reduction)


def _same_shape(weight: Tensor, loss: Tensor) -> Tensor:
    if weight.numel() != loss.numel():
        raise UDAError(f"One weight a sample: got {tuple(weight.shape)} for {loss.numel()} samples.")
    return weight.reshape(loss.shape).to(loss.dtype)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax in nats, ``[B, C] -> [B]``; from log-softmax, so no epsilon."""
    with no_autocast(logits):
        log_p = full(logits).log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean of :func:`entropy` over the batch: entropy minimisation (Grandvalet & Bengio, 2004)."""
    return entropy(logits).mean()


def log_mean_probs(logits: Tensor, over_ranks: bool = False) -> Tensor:
    """``log mean_b softmax(z_b)_c``, ``[B, C] -> [C]``: the mean prediction, whose small entries keep their digits.

    Args:
        over_ranks: over the batches of all processes, which must then all call it; see
            :func:`~uda.ranks.of_all_ranks`.
    """
    with no_autocast(logits):
        log_p = full(logits).log_softmax(1)
        log_mean = log_p.logsumexp(0) - math.log(len(log_p))
        if not over_ranks:
            return log_mean
        every = of_all_ranks(log_mean)
        return every.logsumexp(0) - math.log(len(every))


def information_maximisation(logits: Tensor, over_ranks: bool = False) -> Tensor:
    """Mutual information of sample and class, ``H(mean_i p_i) - mean_i H(p_i)``, in [0, log C].

    To be *maximised*: certain predictions that use all classes (Krause et al., 2010; SHOT: Liang et al.,
    2020, eq. 4 and 5). The loss is its negative. ``over_ranks`` as in :func:`log_mean_probs`.
    """
    with no_autocast(logits):
        log_mean = log_mean_probs(logits, over_ranks)
        return -(log_mean.exp() * log_mean).sum() - mean_entropy(logits)


def domain_adversarial_loss(
    source_logit: Tensor,
    target_logit: Tensor,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
    mean: Literal["weighted", "batch"] = "weighted",
) -> Tensor:
    """``1/2 [BCE(source, 1) + BCE(target, 0)]`` of a domain discriminator (Ganin et al., 2016).

    Each domain counts one half, however many samples it has.

    Args:
        source_logit: logits ``[Bs]`` or ``[Bs, 1]``; target_logit: ``[Bt]`` or ``[Bt, 1]``.
        source_weight: weights ``[Bs]``; target_weight: ``[Bt]``.
        mean: of weighted samples: ``sum(w l) / sum(w)`` (``weighted``), or ``sum(w l) / B`` (``batch``), so that a
            domain of small weights counts less.
    """
    if mean not in ("weighted", "batch"):
        raise UDAError(f"Unknown mean {mean!r} of the domain loss: use 'weighted' or 'batch'.")

    def half(logit: Tensor, label: float, weight: Tensor | None) -> Tensor:
        if logit.ndim > 1 and logit.shape[1:].numel() != 1:
            raise UDAError(f"A domain logit is one number a sample, not shape {tuple(logit.shape)}.")
        logit = full(logit).flatten()
        loss = F.binary_cross_entropy_with_logits(logit, torch.full_like(logit, label), reduction="none")
        if weight is None:
            return loss.mean()
        weight = _same_shape(weight, loss)
        if mean == "batch":
            return (weight * loss).mean()
        return (weight * loss).sum() / weight.sum().clamp_min(torch.finfo(loss.dtype).eps)

    with no_autocast(source_logit):
        return (half(source_logit, 1.0, source_weight) + half(target_logit, 0.0, target_weight)) / 2


def entropy_weights(
    logits: Tensor, normalise: Literal["domain", "none"] = "domain", detach: bool = True
) -> Tensor:
    """``1 + exp(-H(p))`` ``[B]``: certain samples weigh more (CDAN+E: Long et al., 2018).

    Args:
        logits: ``[B, C]`` of one domain.
        normalise: ``"domain"`` divides by the mean over the batch, so that the weights have mean 1.
        detach: no gradient through the weights; otherwise only through the entropy, not the normaliser.
    """
    if normalise not in ("domain", "none"):
        raise UDAError(f"Unknown normalisation {normalise!r} of the entropy weights: use 'domain' or 'none'.")
    with no_autocast(logits):
        weight = 1 + torch.exp(-entropy(logits.detach() if detach else logits))
        return weight / weight.mean().detach() if normalise == "domain" else weight


def outer_product(features: Tensor, probs: Tensor) -> Tensor:
    """Multilinear map ``g (x) f`` (CDAN: Long et al., 2018): ``[B, F]``, ``[B, C]`` -> ``[B, C * F]``.

    The C blocks of length F stand one after the other.
    """
    return torch.einsum("bc,bf->bcf", probs.to(features.dtype), features).flatten(1)


class RandomisedMap(nn.Module):
    """Randomised multilinear map ``(f R_f) * (g R_g) / sqrt(d)`` (CDAN: Long et al., 2018).

    Stands for :func:`outer_product` where C * F is large: inner products agree in expectation. The matrices
    are standard normal, made from ``seed`` alone (so equal on all ranks) and kept as buffers.

    Args:
        in_features: F; num_classes: C; out_features: d.
    """

    features_map: Tensor
    probs_map: Tensor

    def __init__(self, in_features: int, num_classes: int, out_features: int = 1024, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.out_features = out_features
        self.register_buffer("features_map", torch.randn(in_features, out_features, generator=random))
        self.register_buffer("probs_map", torch.randn(num_classes, out_features, generator=random))

    def forward(self, features: Tensor, probs: Tensor) -> Tensor:
        """``[B, F]``, ``[B, C]`` -> ``[B, d]``."""
        return (features @ self.features_map) * (probs @ self.probs_map) / self.out_features**0.5


def minimum_class_confusion(logits: Tensor, temperature: float = 2.5, detach: bool = True) -> Tensor:
    """Minimum class confusion of unlabelled logits ``[B, C]`` (MCC: Jin et al., 2020).

    With ``p = softmax(z / T)`` and certainty weights ``w_i = B (1 + exp(-H_i)) / sum_j (1 + exp(-H_j))``
    the confusion matrix ``p^T diag(w) p`` is normalised by rows, and the loss is the mean over classes of what
    lies off its diagonal. A class that no sample predicts at all adds nothing.

    Args:
        logits: ``[B, C]``; temperature: T.
        detach: the weights are constants, as in the authors' code; otherwise the gradient is that of the whole formula.
    """
    with no_autocast(logits):
        scaled = full(logits) / temperature
        p = scaled.softmax(1)
        weight = entropy_weights(scaled, "none", detach)
        weight = weight / weight.mean()  # mean 1 over the batch, which is the paper's normalisation
        confusion = p.T @ (p * weight[:, None])
        confusion = confusion / confusion.sum(1, keepdim=True).clamp_min(1e-12)
        return (confusion.sum() - confusion.trace()) / p.shape[1]
