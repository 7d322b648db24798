"""Meta-DMoE: experts of the source domains, gathered by a transformer, teach the student at test time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full, no_autocast
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import feature_size, seeded
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import mix_statistics


class Aggregator(nn.Module):
    """A transformer over the experts of a sample, and its mean (Meta-DMoE, section 3.2).

    Args:
        width: D, of the experts' features; classes: C, of the head that only its own training uses.
        depth, heads, dropout: of the transformer; its inner layers are ``2 D`` wide.
    """

    def __init__(self, width: int, classes: int, depth: int = 1, heads: int = 16, dropout: float = 0.1) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(
            nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ))  # fmt: skip
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def features(self, tokens: Tensor) -> Tensor:
        """``[B, K, D] -> [B, D]``."""
        return self.layers(tokens).mean(1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[B, C]``."""
        return self.head(self.features(tokens))


def gap(features: Tensor, teacher: Tensor) -> Tensor:
    """Mean square over samples and dimensions, of ``[B, D]`` and ``[B, D]`` (eq. 2)."""
    with no_autocast(features):
        return (full(features) - full(teacher)).square().mean()


def inner_step(theta: dict[str, Tensor], loss: Tensor, lr: float, second_order: bool) -> dict[str, Tensor]:
    """``theta - lr * grad loss`` (eq. 3); to first order the gradient is a constant."""
    grads = torch.autograd.grad(
        loss, list(theta.values()), create_graph=second_order, allow_unused=True, materialize_grads=True
    )
    return {n: p - lr * g for (n, p), g in zip(theta.items(), grads, strict=True)}


class MetaDMoE(Method):
    """Distil experts into the student on a few target samples, as it was meta-trained to (Zhong et al., NeurIPS 2022).

    Source domain ``d`` belongs to expert ``d mod experts``. :meth:`prepare` trains the experts (from the source model,
    by cross-entropy), the aggregator on their features, then the student and the aggregator over episodes of one source
    domain: a step towards the aggregated features of the *other* experts on ``support`` samples, and cross-entropy of
    what comes out on the others. In a stream the first ``support`` samples give one step with all experts, from which
    all later batches are predicted. Defaults are the authors' for Camelyon17.

    Args:
        experts: how many, two or more; there must be as many source domains.
        support: samples that are adapted to; while fewer have come, the step is made anew with those there are.
        batch_size: support and query of an episode together.
        lr, aggregator_lr: of the meta-training (Adam); both fall by ``decay`` an epoch. epochs: of it; 0: none.
        inner_lr: of the step on the support.
        order: ``second``: through the step, which is what trains the aggregator; ``first``: the step's gradient is a
            constant, and the aggregator stays as it was pre-trained.
        expert_lr, expert_decay, expert_epochs: of the experts (Adam, weight decay).
        aggregator_pretrain_lr, aggregator_epochs: of the aggregator before the episodes (Adam).
        pretrain_batch_size: of experts and aggregator. depth, heads, dropout: of the aggregator.
        adapt: ``first``: once after the start of the stream and after each known shift, as published; ``each``: each
            batch by itself, where nobody knows the shifts.
        source_weight: share of the source's BatchNorm statistics, in all networks; published: 1.
    """

    needs, scored = "domains", "after the step"

    def __init__(
        self, experts: int = 2, support: int = 64, batch_size: int = 96, lr: float = 1e-4, aggregator_lr: float = 1e-6,
        decay: float = 0.96, epochs: int = 10, inner_lr: float = 1e-3, order: Literal["first", "second"] = "second",
        expert_lr: float = 1e-3, expert_decay: float = 1e-2, expert_epochs: int = 5,
        aggregator_pretrain_lr: float = 3e-6, aggregator_epochs: int = 5, pretrain_batch_size: int = 32,
        depth: int = 1, heads: int = 16, dropout: float = 0.1, adapt: Literal["first", "each"] = "first",
        source_weight: float = 1.0,
    ) -> None:  # fmt: skip
        if experts < 2:
            raise UDAError(f"MetaDMoE: experts must be 2 or more, not {experts}: an episode leaves one out.")
        if not 0 < support < batch_size:
            raise UDAError(f"MetaDMoE: support must be in 1 to batch_size - 1 = {batch_size - 1}, not {support}.")
        for name, value, known in (("order", order, ("first", "second")), ("adapt", adapt, ("first", "each"))):
            if value not in known:
                raise UDAError(f"MetaDMoE: {name} is {known[0]!r} or {known[1]!r}, not {value!r}.")
        self.experts, self.support, self.batch_size, self.lr, self.aggregator_lr = (
            experts, support, batch_size, lr, aggregator_lr,
        )  # fmt: skip
        self.decay, self.epochs, self.inner_lr, self.order = decay, epochs, inner_lr, order
        self.expert_lr, self.expert_decay, self.expert_epochs = expert_lr, expert_decay, expert_epochs
        self.aggregator_pretrain_lr, self.aggregator_epochs = aggregator_pretrain_lr, aggregator_epochs
        self.pretrain_batch_size, self.depth, self.heads, self.dropout = pretrain_batch_size, depth, heads, dropout
        self.adapt, self.source_weight, self.episodic = adapt, source_weight, adapt == "each"

    # ------------------------------------------------------------------------------------------ its networks

    def attach(self, a: Adapter) -> None:
        """Experts like the net, and the aggregator."""
        mix_statistics(a, self.source_weight)
        width, classes = feature_size(a, "MetaDMoE")
        if width % self.heads:
            raise UDAError(f"MetaDMoE: heads={self.heads} does not divide the {width} features: give another number.")
        for k in range(self.experts):
            a.add(f"expert{k}", a.copy())
        with seeded(a):
            aggregator = Aggregator(width, classes, self.depth, self.heads, self.dropout)
        a.add("aggregator", aggregator.to(next(a.net.parameters()).dtype))
        self._train_features(a)

    def _train_features(self, a: Adapter) -> None:
        a.train_parameters(list(self.student(a).values()), "sgd", self.inner_lr, momentum=0.0)

    @staticmethod
    def student(a: Adapter) -> dict[str, nn.Parameter]:
        """What the inner step moves: all but the classifier."""
        return {n: p for n, p in a.net.named_parameters() if not n.startswith(f"{a.head}.")}

    @torch.no_grad()
    def tokens(self, a: Adapter, x: Tensor, without: int | None = None) -> Tensor:
        """Features ``[B, K, D]`` of the experts, less one."""
        kept = [a.extra[f"expert{k}"] for k in range(self.experts) if k != without]
        return torch.stack([a.features(x, net)[0].flatten(1) for net in kept], 1)

    # ---------------------------------------------------------------------------------------- before the stream

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Experts, aggregator, episodes."""
        names, numbers = source.domain.unique(return_inverse=True)
        if len(names) < self.experts:
            raise UDAError(f"MetaDMoE: {self.experts} experts need as many source domains; there are {len(names)}.")
        smallest = int(numbers.bincount().min())
        if smallest <= self.support:
            raise UDAError(
                f"MetaDMoE: an episode adapts to {self.support} samples and needs more for its query, but a source "
                f"domain has {smallest}: lower `support` (of TestTime: raise `source_samples`)."
            )
        source = SourceSamples(source.x, source.y, numbers)
        for k in range(self.experts):
            net, own = a.extra[f"expert{k}"], source.domain % self.experts == k
            part = SourceSamples(source.x[own], source.y[own], source.domain[own])
            a.train_parameters(list(net.parameters()), "adam", self.expert_lr, weight_decay=self.expert_decay)
            for batch in self._epochs(a, part, self.expert_epochs):
                a.update(F.cross_entropy(net(batch["x"]), batch["y"]))
        aggregator = a.extra["aggregator"]
        a.train_parameters(list(aggregator.parameters()), "adam", self.aggregator_pretrain_lr)
        with seeded(a):  # dropout
            aggregator.train()
            for batch in self._epochs(a, source, self.aggregator_epochs):
                a.update(F.cross_entropy(aggregator(self.tokens(a, batch["x"])), batch["y"]))
            aggregator.eval()
        self._episodes(a, source)
        self._train_features(a)
        a.updates = 0

    def _epochs(self, a: Adapter, source: SourceSamples, epochs: int) -> Iterator[dict[str, Tensor]]:
        device = next(a.net.parameters()).device
        for _ in range(epochs):
            for batch in source.batches(self.pretrain_batch_size, a.generator):
                yield {k: v.to(device) for k, v in batch.items()}

    def _episodes(self, a: Adapter, source: SourceSamples) -> None:
        groups = [
            {"params": list(a.net.parameters()), "lr": self.lr},
            {"params": list(a.extra["aggregator"].layers.parameters()), "lr": self.aggregator_lr},
        ]
        a.train_parameters(groups, "adam", self.lr)
        device = next(a.net.parameters()).device
        for _ in range(self.epochs):
            for batch in source.domain_batches(self.batch_size, a.generator):
                x, y = batch["x"].to(device), batch["y"].to(device)
                a.update(self.episode(a, x, y, int(batch["domain"][0])))
            for group in a.optimizer.param_groups:
                group["lr"] *= self.decay

    def episode(self, a: Adapter, x: Tensor, y: Tensor, domain: int) -> Tensor:
        """The meta-objective (eq. 4) on one batch of a source domain: cross-entropy of the query after the inner step.

        Args:
            x: ``[B, ...]``, the support first, then the query; y: ``[B]``; domain: the expert of which is left out.
        """
        known, asked = x[: self.support], x[self.support :]
        teacher = a.extra["aggregator"].features(self.tokens(a, known, domain % self.experts))
        loss = gap(a.features(known)[0].flatten(1), teacher)
        theta = inner_step(self.student(a), loss, self.inner_lr, self.order == "second")
        return F.cross_entropy(functional_call(a.net, theta, (asked,)), y[self.support :])

    # ---------------------------------------------------------------------------------------------- the stream

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """One step from the meta-trained student on the support, where that grew; then the prediction."""
        kept = None if self.adapt == "each" else a.state.get("support")
        room = self.support - (0 if kept is None else len(kept))
        if room:
            support = torch.cat([x[:room]] if kept is None else [kept, x[:room]])
            a.reset_weights()
            with torch.no_grad():
                teacher = a.extra["aggregator"].features(self.tokens(a, support))
            a.update(gap(a.features(support)[0].flatten(1), teacher))
            if self.adapt == "first":
                a.state["support"] = support
        with torch.no_grad():
            return self.predict(a, x)
