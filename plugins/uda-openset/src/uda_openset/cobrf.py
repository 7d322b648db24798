"""Collaborative training of balanced random forests (CoBRF: Ryu, Bae and Lim, arXiv 2002.03642)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.losses import class_distributions
from uda_openset.forest import BalancedForest


def vote_entropy(votes: Tensor) -> Tensor:
    """Entropy of votes ``[B, C]`` over its maximum, ``[B]`` in [0, 1]."""
    return torch.special.entr(votes).sum(1) / math.log(max(votes.shape[1], 2))


class CoBRF(uda.Plugin):
    """A balanced random forest on the features, grown anew each epoch, and features that are trained for it.

    The forest (:class:`~uda_openset.forest.BalancedForest`) halves the source at each node with the largest information
    gain. In between, features are trained to be told by it (``weight`` times the cross-entropy of its votes on the
    source), to have certain votes on the target (``entropy_weight``) and to be split evenly in both domains
    (``alignment_weight``). A target sample is unknown where the entropy of its votes is above the ``quantile`` of the
    source's. The paper gives these ideas; the equations are this implementation's own.

    Args:
        weight: of the votes on the source. entropy_weight: of the target's vote entropy.
        alignment_weight: of the unevenness of both domains' splits, in training.
        node_alignment: how much an uneven split of the target counts against a hyperplane when the forest is grown.
        quantile: of the source's vote entropies, above which a target sample is unknown.
        by_forest: the forest names the class; otherwise the classifier.
        trees, depth, candidates, softness: the forest.
    """

    settings = ("closed", "open", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 2.0, "log"), "entropy_weight": (0.01, 0.3, "log"), "alignment_weight": (0.1, 3.0, "log"),
    }  # fmt: skip
    limit: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        entropy_weight: float = 0.1,
        alignment_weight: float = 1.0,
        node_alignment: float = 1.0,
        quantile: float = 0.9,
        by_forest: bool = True,
        trees: int = 8,
        depth: int = 4,
        candidates: int = 32,
        softness: float = 0.2,
    ) -> None:
        super().__init__()
        if min(weight, entropy_weight, alignment_weight, node_alignment) < 0 or not 0 < quantile < 1:
            raise uda.UDAError("CoBRF: weights must not be negative, and quantile lies between 0 and 1.")
        if min(trees, depth, candidates) < 1 or depth > 10 or softness <= 0:
            raise uda.UDAError("CoBRF: trees, depth (at most 10), candidates and softness must be positive.")
        self.weight, self.entropy_weight, self.alignment_weight = weight, entropy_weight, alignment_weight
        self.node_alignment, self.quantile, self.by_forest = node_alignment, quantile, by_forest
        self._shape = {"trees": trees, "depth": depth, "candidates": candidates, "softness": softness}
        self.forest: BalancedForest | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains as a whole, each epoch."""
        return uda.DataNeeds(refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """An empty forest."""
        if self.forest is None:
            self.forest = BalancedForest(model.feature_dim, model.num_classes, **self._shape)
            self.register_buffer("limit", torch.tensor(1.0))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Grow the forest on the features as they are."""
        x = torch.cat([p.features for p in bank.sources.values()])
        y = torch.cat([p.y for p in bank.sources.values()])
        self.forest.grow(x, y, bank.target.features, self.node_alignment)
        votes = torch.cat([self.forest.votes(part) for part in x.split(4096)])
        self.limit.copy_(vote_entropy(votes).sort().values[int(self.quantile * (len(votes) - 1))])
        self.log_later(forest_accuracy=(votes.argmax(1) == y).float().mean(), limit=self.limit.clone())

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """What features learn from the forest."""
        source, target = step.pooled("features"), step.target.features
        votes = self.forest.votes(source).clamp_min(1e-6)
        y = class_distributions(step.pooled("y"), votes.shape[1], votes.dtype)
        out = {"votes": self.weight * -(y * votes.log()).sum(1).mean()}
        if self.entropy_weight:
            out["entropy"] = self.entropy_weight * vote_entropy(self.forest.votes(target)).mean()
        if self.alignment_weight:
            uneven = self.forest.unevenness(source) + self.forest.unevenness(target)
            out["uneven"] = self.alignment_weight * uneven / 2
        return out

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: Any) -> uda.Prediction | None:
        """The class that most votes are for."""
        if not self.by_forest:
            return None
        score, label = self.forest.votes(batch.features).max(1)
        return uda.Prediction(label, score)

    @uda.hookimpl
    def reject(self, model: uda.UDA, batch: Any, prediction: uda.Prediction) -> uda.Prediction:
        """Unknown where the trees disagree more than on all but few source samples."""
        found = vote_entropy(self.forest.votes(batch.features))
        if batch.role == "source":
            return replace(prediction, unknown_score=found)
        return prediction.rejecting(found > self.limit, found)
