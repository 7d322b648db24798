"""ParetoDA's objectives: target predictions refined by class-wise domain nets (Lv et al., NeurIPS 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.losses import class_distributions, information_maximisation
from uda.nn import full, no_autocast


def refine(logits: Tensor, domain_logits: Tensor, raw: bool = False) -> Tensor:
    """Logits ``[B, C]`` of the target prediction refined by Bayes' theorem.

    ``p(y | x, d=t)`` is proportional to ``p(y | x) p(d=t | x, y)``: in the softmax of what is returned.

    Args:
        logits: classifier output ``[B, C]``; ``domain_logits``: of the class-wise domain nets ``[B, C]``, source
            positive, taken as constants.
        raw: multiply the logits themselves, as the published code does.
    """
    with no_autocast(logits):
        logits, domain_logits = full(logits), full(domain_logits).detach()
        return logits * torch.sigmoid(-domain_logits) if raw else logits + F.logsigmoid(-domain_logits)


def mimicking_loss(refined: Tensor) -> Tensor:
    """Target-classification-mimicking loss ``log C - [H(mean_i q_i) - mean_i H(q_i)]``, never negative.

    ``q`` is the softmax of ``refined`` ``[B, C]``. The constant ``log C`` makes zero the best value.
    """
    return math.log(refined.shape[1]) - information_maximisation(refined)


def class_domain_loss(
    source: Tensor, y: Tensor, target: Tensor, belief: Tensor, last_only: bool = False
) -> Tensor:
    """Loss of the class-wise domain nets: net c sees the source samples of class c, and target samples by belief.

    ``1/2 1/C sum_c [mean_i 1(y_i = c) BCE(z_ic, 1) + mean_i belief_ic BCE(z_ic, 0)]``.

    Args:
        source: logits ``[Bs, C]``; ``y``: class ids ``[Bs]`` or distributions ``[Bs, C]``; ``target``: logits
            ``[Bt, C]``; ``belief``: class probabilities ``[Bt, C]``, constants.
        last_only: the published code's indicator, which is that of the last sample for all samples.
    """
    with no_autocast(source):
        source, target = full(source), full(target)
        member = class_distributions(y, source.shape[1], source.dtype)
        if last_only:
            member = member[-1:].expand_as(source)
        return ((member * F.softplus(-source)).mean() + (belief.detach() * F.softplus(target)).mean()) / 2


class ClassDomainNets(nn.Module):
    """A domain discriminator a class, all in one forward: ``[B, F] -> [B, C]`` logits, source positive.

    Each is Linear-BatchNorm-ReLU ``layers`` times, then Linear to one logit (which says the same as two outputs under
    a softmax). With BatchNorm, give both domains in one batch.

    Args:
        in_features: F; num_classes: C; hidden: width; layers: hidden layers; batch_norm: normalise them.
    """

    def __init__(
        self, in_features: int, num_classes: int, hidden: int = 1024, layers: int = 2, batch_norm: bool = True
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.weights, self.biases, self.norms = nn.ParameterList(), nn.ParameterList(), nn.ModuleList()
        for i in range(layers + 1):
            size = hidden if i < layers else 1
            bound = 1 / math.sqrt(in_features)  # as nn.Linear
            self.weights.append(nn.Parameter(torch.empty(num_classes, in_features, size).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(num_classes, 1, size).uniform_(-bound, bound)))
            if i < layers:
                self.norms.append(nn.BatchNorm1d(num_classes * hidden) if batch_norm else nn.Identity())
            in_features = size

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F] -> [B, C]``."""
        x = features.expand(self.num_classes, *features.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)  # [C, B, width]
            if i < len(self.norms):
                flat = x.transpose(0, 1).flatten(1)  # BatchNorm of every class at once
                x = F.relu(self.norms[i](flat)).unflatten(1, (self.num_classes, -1)).transpose(0, 1)
        return x.squeeze(2).T
