"""Source model, BatchNorm statistics, TENT and LAME."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.losses import entropy
from uda.nn import full, no_autocast
from uda_testtime.adapter import Adapter, Method
from uda_testtime.checks import check_head
from uda_testtime.surgery import mix_statistics, norm_parameters


class Source(Method):
    """No adaptation."""

    averages, scored = True, "the only one"


class BNStatistics(Method):
    """BatchNorm statistics of each batch, mixed with the source's (Schneider et al., 2020; You et al., 2021).

    Args:
        source_weight: share of the **source** statistics. 0 replaces them; alpha-BN's alpha is this share, other code
            calls the share of the batch alpha.
    """

    averages, scored = True, "the only one"

    def __init__(self, source_weight: float = 0.0) -> None:
        if not 0 <= source_weight <= 1:
            raise UDAError(f"BNStatistics: source_weight lies in [0, 1], not {source_weight}.")
        self.source_weight = source_weight

    def attach(self, a: Adapter) -> None:
        """Put the layers in."""
        if not mix_statistics(a, self.source_weight):
            raise UDAError("BNStatistics: the model has no BatchNorm below it with running statistics.")


class TENT(Method):
    """Entropy minimisation over scale and shift of normalisation layers (Wang et al., 2021).

    Scored: the logits before the update. BatchNorm uses batch statistics.

    Args:
        lr: learning rate; optimizer: ``adam`` or ``sgd``; weight: of the entropy.
        source_weight: share of the source's BatchNorm statistics.
    """

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, source_weight: float = 0.0
    ) -> None:
        self.lr, self.optimizer, self.weight, self.source_weight = lr, optimizer, weight, source_weight

    def attach(self, a: Adapter) -> None:
        """Batch statistics, and an optimiser over scale and shift."""
        parameters = self.trained(a.net)  # before the surgery, which keeps the layers but renames them
        mix_statistics(a, self.source_weight)
        if not parameters:
            who = type(self).__name__
            raise UDAError(f"{who}: the model has no normalisation layer with scale and shift to train.")
        a.train_parameters(parameters, self.optimizer, self.lr)

    def trained(self, net: nn.Module) -> list[nn.Parameter]:
        """What is trained of the source model."""
        return norm_parameters(net)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, then one step on their mean entropy."""
        logits = a.net(x)
        a.update(self.weight * entropy(logits).mean())
        return logits


@torch.no_grad()
def lame(probs: Tensor, features: Tensor, k: int = 5, rounds: int = 100) -> Tensor:
    """Assignments ``[N, C]`` by the concave-convex procedure (Boudiaf et al., 2022): ``Y <- softmax(log p + W Y)``.

    Args:
        probs: softmax outputs ``[N, C]``; features: ``[N, D]``; rounds: at most.
        k: neighbours; ``W[i, j] = 1`` where j is among the k nearest of i by cosine, i itself left out.
    """
    with no_autocast(probs):
        p, g = full(probs), F.normalize(full(features), dim=1)
        similarity = g @ g.T
        similarity.fill_diagonal_(-torch.inf)
        k = min(k, len(p) - 1)
        w = torch.zeros_like(similarity)
        if k > 0:
            w.scatter_(1, similarity.topk(k, 1).indices, 1.0)
        log_p, y, last = (p + 1e-10).log(), p, None
        for i in range(rounds):
            y = (log_p + w @ y).softmax(1)
            log_y = y.clamp_min(1e-20).log()
            energy = float((y * (log_y - log_p)).sum() - (y * (w @ y)).sum())
            if i > 0 and abs(energy - last) <= 1e-8 * abs(last):
                break
            last = energy
    return y


class LAME(Method):
    """Labels that agree with the classifier and among neighbours of a batch (Boudiaf et al., 2022); no weight changes.

    For streams whose neighbours in time share classes; it hurts on shuffled ones. Scored: ``log Y``.

    Args:
        k: neighbours; 0 leaves the classifier's prediction.
    """

    averages, scored = True, "the corrected output"

    def __init__(self, k: int = 5) -> None:
        self.k = k

    def attach(self, a: Adapter) -> None:
        """The classifier's inputs are what neighbours are found by."""
        check_head(a.head, "LAME")

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Log of the assignments."""
        with torch.no_grad():
            features, logits = a.features(x)
            if self.k == 0:
                return logits
            return lame(logits.softmax(1), features.flatten(1), self.k).clamp_min(1e-20).log()
