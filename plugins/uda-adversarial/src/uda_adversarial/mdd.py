"""Margin Disparity Discrepancy (Zhang et al., ICML 2019)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import full, no_autocast, reverse_gradient, warm_start
from uda_adversarial.two_classifiers import TwoClassifiers


def log_complement(logits: Tensor, y: Tensor) -> Tensor:
    """``log(1 - softmax(z)_y)`` ``[B]`` from logits ``[B, C]`` and class ids ``[B]``.

    As a difference of two log-sums it needs no epsilon: neither value nor gradient is lost where p_y is near 1.
    """
    others = logits.scatter(1, y[:, None], float("-inf"))
    return others.logsumexp(1) - logits.logsumexp(1)


def margin_disparity(source: Tensor, target: Tensor, y_source: Tensor, y_target: Tensor, margin: float) -> Tensor:
    """What the auxiliary classifier minimises: ``margin * CE(source, y_source) - mean log(1 - p(target)_y_target)``.

    The negative of the margin disparity discrepancy as Zhang et al. (2019) train it, with ``margin = exp(rho)``.

    Args:
        source: logits ``[Bs, C]`` of the auxiliary classifier; target: ``[Bt, C]``.
        y_source: classes ``[Bs]`` that the main classifier predicts; y_target: ``[Bt]``.
    """
    with no_autocast(source):
        agree = F.cross_entropy(full(source), y_source)
        return margin * agree - log_complement(full(target), y_target).mean()


class MDD(TwoClassifiers):
    """An auxiliary classifier agrees with the main one on the source and disagrees on the target.

    ``L = CE_s + weight * (margin * CE(f'(GRL(z_s)), h_s) - mean log(1 - softmax(f'(GRL(z_t)))_h_t))`` with ``h`` the
    classes that the main classifier predicts; the features get the reversed gradient (Zhang et al. 2019). The main
    classifier learns of the source alone.

    Args:
        weight: of the objective; scales the auxiliary classifier's gradient as well.
        margin: the paper's gamma, ``exp(rho)`` of the margin rho (4).
        reversal: final coefficient of the reversal (0.1), which scales only what reaches the features.
        gamma: steepness of its warm start ``2 / (1 + exp(-gamma p)) - 1`` over the run's progress p.
        head_hidden, layers, batch_norm, dropout: deep classifiers in the place of the model's head (the paper: one
            hidden layer of 1024 with dropout 0.5); 0 for two of the model's kind.
        lr_scale: learning rate of the auxiliary classifier relative to the head's.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.3, 3.0, "log"), "margin": [2.0, 3.0, 4.0], "reversal": (0.03, 1.0, "log"),
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.0,
        margin: float = 4.0,
        reversal: float = 0.1,
        gamma: float = 10.0,
        head_hidden: int = 0,
        layers: int = 1,
        batch_norm: bool = False,
        dropout: float = 0.5,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(head_hidden, layers, batch_norm, dropout, lr_scale)
        if min(weight, reversal) < 0 or margin <= 0:
            raise uda.UDAError("MDD: weight and reversal must not be negative, and margin must be positive.")
        self.weight, self.margin, self.reversal, self.gamma = weight, margin, reversal, gamma

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The disparity of both classifiers behind the reversal."""
        source, target = step.pooled("features"), step.target.features
        y_source, y_target = step.pooled("logits").argmax(1), step.target.logits.argmax(1)
        coefficient = self.reversal * warm_start(step.progress, self.gamma)
        on_source = self.second(reverse_gradient(source, coefficient))
        on_target = self.second(reverse_gradient(target, coefficient))
        self.log_later(
            disagreement=lambda: (on_target.argmax(1) != y_target).float().mean(), reversal=coefficient
        )
        return {"disparity": self.weight * margin_disparity(on_source, on_target, y_source, y_target, self.margin)}
