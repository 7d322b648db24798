"""What the methods of several sources share: a refusal of a single one, and the losses of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.losses import classification_loss, domain_adversarial_loss
from uda.nn import DomainDiscriminator, reverse_gradient, warm_start
from uda.ranks import mean_over_ranks


def require_several(model: uda.UDA, who: str, instead: str) -> list[str]:
    """Names of the sources.

    Raises:
        UDAError: fewer than two; ``instead`` says what to take for one.
    """
    if len(model.source_names) < 2:
        raise uda.UDAError(
            f"{who} needs two sources or more, and this run has {len(model.source_names)}: name them under data.source "
            f"([first, second]), or take {instead}."
        )
    return list(model.source_names)


def per_source_classification(step: uda.Step) -> Tensor:
    """Classification loss of each source ``[M]``, as the skeleton takes it."""
    smoothing = step.model.label_smoothing
    return torch.stack(
        [classification_loss(b.logits, b.y, smoothing, b.weight).float() for b in step.sources.values()]
    )


class AdversaryPerSource(uda.Plugin, ABC):
    """Base: a discriminator for each source against the target, and one sum over all losses by a rule of the subclass.

    The sources' losses are ``l_i = e_i + weight * d_i`` with the classification loss e_i and the discriminator's
    ``d_i = 1/2 (BCE(D_i(f_i), 1) + BCE(D_i(f_t), 0))`` behind gradient reversal. The papers' code takes the sum of both
    halves: its mu is ``weight / 2``. The subclass joins the l_i to one loss, which takes the place of their mean: the
    objective ``joined`` is the difference, so that the sum with the skeleton's ``classification`` is that of the paper.

    Args:
        weight: of the discriminators' losses. Published: mu 0.01.
        gamma: steepness of the reversal's warm start ``2 / (1 + exp(-gamma p)) - 1`` over the run's progress p; 0:
            none, as published.
        hidden, layers, batch_norm: each discriminator, ``layers`` hidden layers of width ``hidden``; 0: linear, as
            published.
        lr_scale: learning rate of the discriminators relative to the head's. Published is Adadelta, whose steps do not
            depend on a loss's scale: ``1 / weight`` gives an SGD the same, and discriminators that keep up.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.03, 3.0, "log"), "sharpness": (0.3, 30.0, "log")}

    def __init__(
        self, weight: float, gamma: float, hidden: int, layers: int, batch_norm: bool, lr_scale: float
    ) -> None:
        super().__init__()
        if weight < 0 or gamma < 0:
            raise uda.UDAError(f"{type(self).__name__}: weight and gamma must not be negative.")
        self.weight, self.gamma, self.lr_scale = weight, gamma, lr_scale
        self._net = {"hidden": hidden, "layers": layers, "batch_norm": batch_norm}
        self.discriminators = nn.ModuleList()

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """A discriminator a source."""
        names = require_several(model, type(self).__name__, "DANN, which is the same for one source")
        if not len(self.discriminators):
            self.discriminators.extend(DomainDiscriminator(model.feature_dim, **self._net) for _ in names)

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The discriminators at their own rate."""
        return [{"name": self.key, "params": self.discriminators.parameters(), "lr_scale": self.lr_scale}]

    def per_source_domain(self, step: uda.Step) -> Tensor:
        """``d_i`` of each source ``[M]``; one forward over source and target together."""
        coefficient = warm_start(step.progress, self.gamma) if self.gamma else 1.0
        target = reverse_gradient(step.target.features, coefficient)
        out = []
        for net, batch in zip(self.discriminators, step.sources.values(), strict=True):
            source = reverse_gradient(batch.features, coefficient)
            logits = net(torch.cat([source, target])).squeeze(1)
            out.append(domain_adversarial_loss(logits[: len(source)], logits[len(source) :]))
        return torch.stack(out)

    @abstractmethod
    def join(self, classification: Tensor, domain: Tensor) -> tuple[Tensor, Tensor]:
        """Scalar loss and the sources' weights ``[M]`` for the log, from e and ``weight * d`` ``[M]`` each."""

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """What the joined loss has over the mean of the classification losses."""
        e = per_source_classification(step)
        total, weights = self.join(e, self.weight * self.per_source_domain(step))
        self.log_later(**{f"weight_{name}": w for name, w in zip(step.sources, weights.detach(), strict=True)})
        return {"joined": total - e.mean()}


def over_ranks(values: Tensor) -> Tensor:
    """Mean over the processes, as a constant: weights are those of the whole batch, and the same everywhere."""
    return mean_over_ranks([values.detach()])[0]
