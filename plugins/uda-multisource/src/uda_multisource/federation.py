"""A federation in one process: sources as clients, a target with few labels, and a server that joins updates."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from uda.errors import UDAError, check_choice
from uda.losses import classification_loss
from uda_multisource.aggregation import RULES, State, auto_beta, difference, joined, moved

Batch = tuple[Tensor, Tensor]
Batches = Callable[[], Iterator[Batch]]


def trained(
    net: nn.Module, start: State, batches: Iterator[Batch], optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[State, int, int]:
    """State after one pass over a client's batches from ``start``, by a fresh optimiser; samples and batches seen."""
    net.load_state_dict(start)
    net.train()
    stepper, samples, steps = optimizer(net.parameters()), 0, 0
    with torch.enable_grad():
        for x, y in batches:
            stepper.zero_grad()
            classification_loss(net(x), y).backward()
            stepper.step()
            samples, steps = samples + len(y), steps + 1
    return {k: v.clone() for k, v in net.state_dict().items()}, samples, steps


class Federation:
    """FedGP, FedDA or FedAvg with clients simulated one after another (Jiang, Zhang and Koyejo 2024).

    A round: each source trains the server's net for one pass, the target for one on its few labelled samples, and
    :func:`~uda_multisource.aggregation.joined` makes one update of theirs. Uses target labels: not for tables of
    unsupervised methods. Numbers that are no floats (BatchNorm's counters) are the target's.

    Args:
        net: the server's, trained in place.
        sources: for each client a function that gives its batches ``(x, y)`` of one pass; target: the same.
        optimizer: of a source's pass, made anew for each; target_optimizer: of the target's, published at a fifth of
            the learning rate; None: the same.
        rule: ``fedgp``, ``fedda`` or ``fedavg``.
        beta: weight of the sources, published 0.5; ``auto``: :func:`~uda_multisource.aggregation.auto_beta` in each
            round, from the target's updates batch by batch, and the mean update of a source's batches.
    """

    def __init__(
        self,
        net: nn.Module,
        sources: Sequence[Batches],
        target: Batches,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        target_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
        rule: str = "fedgp",
        beta: float | str = 0.5,
    ) -> None:
        check_choice("Federation", "rule", rule, RULES)
        if not sources:
            raise UDAError("Federation needs one source or more.")
        if isinstance(beta, str):
            check_choice("Federation", "beta", beta, ("auto",))
        elif not 0 <= beta <= 1:
            raise UDAError(f"Federation: beta is a share in [0, 1] or 'auto', not {beta}.")
        self.net, self.sources, self.target = net, list(sources), target
        self.optimizer, self.target_optimizer = optimizer, target_optimizer or optimizer
        self.rule, self.beta = rule, beta
        self.betas: list[list[float]] = []
        self._worker = copy.deepcopy(net)

    def round(self) -> list[float]:
        """One round; the weights of the sources in it."""
        start = {k: v.clone() for k, v in self.net.state_dict().items()}
        updates, shares, steps = [], [], []
        for batches in self.sources:
            end, seen, taken = trained(self._worker, start, batches(), self.optimizer)
            if not seen:
                raise UDAError("Federation: a source gave no batch.")
            updates.append(difference(end, start))
            shares.append(seen)
            steps.append(taken)
        end, seen, _ = trained(self._worker, start, self.target(), self.target_optimizer)
        if not seen and self.rule != "fedavg":
            raise UDAError(f"Federation: {self.rule} needs labelled target samples, and the target gave none.")
        target = difference(end, start)
        weights = (
            self._auto(start, updates, steps) if isinstance(self.beta, str) else [float(self.beta)] * len(updates)
        )
        change = joined(target, updates, shares, weights, self.rule)
        self.net.load_state_dict(moved(start, change, end))
        self.betas.append(weights)
        return weights

    def run(self, rounds: int) -> nn.Module:
        """The net after some rounds."""
        for _ in range(rounds):
            self.round()
        return self.net.eval()

    def _auto(self, start: State, updates: list[State], taken: list[int]) -> list[float]:
        """Weights from the updates of single target batches, parameters alone."""
        names = {k for k, _ in self.net.named_parameters()}
        steps = [
            {k: v for k, v in difference(trained(self._worker, start, iter([batch]), self.target_optimizer)[0], start)
             .items() if k in names}
            for batch in self.target()
        ]  # fmt: skip
        rule = "fedda" if self.rule == "fedavg" else self.rule
        means = [{k: v / n for k, v in u.items() if k in names} for u, n in zip(updates, taken, strict=True)]
        return [auto_beta(steps, u, rule) for u in means]
