"""Confident Anchor-Induced Multi-Source Free Domain Adaptation (CAiDA: Dong et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from uda_sourcefree.neighbours import nearest
from uda_sourcefree.shot import centroids

import uda
from uda.nn import full, no_autocast
from uda_multisource.decision import LabelledExperts


def confident(values: Tensor, share: float) -> Tensor:
    """Mask of the ``share`` of rows with the largest lead of the largest value over the second, ``[N, C] -> [N]``."""
    top = values.topk(2, dim=1).values
    lead = torch.where(top[:, 1].isinf(), torch.inf, top[:, 0] - top[:, 1])
    keep = max(1, round(share * len(values)))
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[lead.topk(keep).indices] = True
    return mask


def anchor_labels(features: Tensor, probs: Tensor, mix: Tensor, share: float = 0.5) -> Tensor:
    """Labels ``[N]`` by the centroids of features that have moved towards the nearest confident anchor.

    Centroids of the classes by the probabilities label each sample. Anchors are samples that are confident by their
    centroids or by their probabilities, in the ``share`` of the largest leads of either. Each feature f (of length 1,
    with a column of ones) becomes ``mix f + (1 - mix) f_anchor`` with its nearest anchor but itself; the centroids of
    these by the labels give the new ones. The authors' code walks from neighbour to neighbour until it meets an anchor.

    Args:
        features: joined, ``[N, F]``; probs: ``[N, C]``; mix: ``[N]``.
    """
    f, _, cosine = centroids(features, probs, 1)
    labels = cosine.argmax(1)
    anchors = (confident(cosine, share) | confident(full(probs), share)).nonzero().squeeze(1)
    if len(anchors) > 1:
        near = anchors[nearest(f, f[anchors], 2)]
        own = near[:, 0] == torch.arange(len(f), device=f.device)
        f = mix[:, None] * f + (1 - mix[:, None]) * f[torch.where(own, near[:, 1], near[:, 0])]
    member = F.one_hot(labels, probs.shape[1]).to(f.dtype)
    centres = member.T @ f / (1e-8 + member.sum(0)[:, None])
    cosine = F.normalize(f, dim=1) @ F.normalize(centres, dim=1).T
    return cosine.masked_fill(member.sum(0) == 0, -torch.inf).argmax(1)


def class_relations(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the experts differ in what they say of each class of a batch (class-relation consistency).

    For each class of the labels, each expert's mean logits over the class become a distribution by softmax; the mean
    over these classes of the Kullback-Leibler divergences of all ordered pairs of experts, divided by their number M.

    Args:
        logits: ``[B, M, C]``; labels: ``[B]``.
    """
    with no_autocast(logits):
        member = F.one_hot(labels, logits.shape[2]).to(full(logits).dtype)
        count = member.sum(0)
        mean = torch.einsum("bk,bmc->kmc", member, full(logits)) / count.clamp_min(1)[:, None, None]
        log_p = mean.log_softmax(2)
        p, present = log_p.exp(), (count > 0).to(log_p.dtype)
        own = (p * log_p).sum(2)  # [K, M]
        divergence = own[:, :, None] - torch.einsum("kmc,knc->kmn", p, log_p)
        return (divergence.sum((1, 2)) * present).sum() / present.sum().clamp_min(1) / logits.shape[1]


class CAiDA(LabelledExperts):
    """Several source models as one, labels from confident anchors, experts that agree on classes (Dong et al. 2021).

    As :class:`~uda_multisource.decision.DECISION`, with labels of :func:`anchor_labels` on the joined features and
    probabilities, and ``relation_weight`` times :func:`class_relations`.

    Args:
        checkpoints, inputs, architectures: as in :class:`~uda_multisource.experts.Experts`.
        label_weight, relation_weight, entropy_weight: published 0.7, 0.01 and 1.
        share: of confident samples, by each of the two measures.
        mix, spread: mean and standard deviation of a sample's own part when it moves to an anchor; published: 0.85 and
            0.15.
    """

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None = None,
        architectures: list[dict[str, Any]] | None = None,
        label_weight: float = 0.7,
        relation_weight: float = 0.01,
        entropy_weight: float = 1.0,
        share: float = 0.5,
        mix: float = 0.85,
        spread: float = 0.15,
    ) -> None:
        super().__init__(checkpoints, inputs, architectures, label_weight, entropy_weight, 1)
        if min(relation_weight, spread) < 0 or not 0 < share <= 1 or not 0 <= mix <= 1:
            raise uda.UDAError("CAiDA: relation_weight and spread not negative, share in (0, 1], mix in [0, 1].")
        self.relation_weight, self.share, self.own_part, self.spread = relation_weight, share, mix, spread

    def make_labels(self, model: uda.UDA, features: Tensor, logits: Tensor) -> Tensor:
        """By anchors."""
        joined = (model.head.weights[None, :, None] * features).sum(1)
        random = torch.Generator().manual_seed(model.base_seed + round(1e6 * model.progress))  # alike on all ranks
        mix = self.own_part + self.spread * torch.randn(len(joined), generator=random).to(joined.device)
        return anchor_labels(joined, model.head.joined(logits).softmax(1), mix, self.share)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Labels, information and relations."""
        found = super().refine_classifier(step)
        if self.relation_weight:
            each, pseudo = step.model.head.each(step.target.features), step.target.pseudo
            some = slice(None) if pseudo.keep is None else pseudo.keep
            found["relations"] = self.relation_weight * class_relations(each[some], pseudo.y[some])
        return found
