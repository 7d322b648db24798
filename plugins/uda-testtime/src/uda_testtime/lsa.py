"""LSA: a classifier that is shifted to the label distribution of the stream, around another method."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full, no_autocast
from uda.nn.heads import class_vectors
from uda_testtime.adapter import Adapter, Method
from uda_testtime.parts import feature_size, seeded
from uda_testtime.registry import make_method, method_class
from uda_testtime.source import SourceSamples


def shifted_logits(head: nn.Module, h: Tensor, gamma: Tensor, beta: Tensor, dw: Tensor, db: Tensor) -> Tensor:
    """``(W + dW)(gamma h + beta) + b + db`` of features ``[B, D]`` and a classifier W, b: logits ``[B, C]``."""
    h = gamma * h + beta
    return head(h) + F.linear(h, dw, db)


class ShiftedHead(nn.Module):
    """A classifier with a shift in buffers: no gradient moves it, and snapshots hold it.

    Args:
        head: features ``[B, D]`` to logits ``[B, C]``, kept as it is; features, classes: D and C.
    """

    NAMES = ("gamma", "beta", "dw", "db")

    def __init__(self, head: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.head = head
        like = next(head.parameters())
        for name, value in zip(self.NAMES, split(like.new_zeros(size(features, classes)), features), strict=True):
            self.register_buffer(name, value.clone())

    @property
    def weight_vectors(self) -> Tensor:
        """Of the classifier ``[C, D]``, without the shift."""
        return self.head.weight if isinstance(self.head, nn.Linear) else class_vectors(self.head, "LSA")

    def forward(self, h: Tensor) -> Tensor:
        """``[B, D] -> [B, C]``."""
        return shifted_logits(self.head, h, self.gamma, self.beta, self.dw, self.db)


def size(features: int, classes: int) -> int:
    """How many numbers a shift has."""
    return 2 * features + classes * features + classes


def split(flat: Tensor, features: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A flat shift as ``gamma [D]``, ``beta [D]``, ``dW [C, D]`` and ``db [C]``; zeros are the identity."""
    classes = (len(flat) - 2 * features) // (features + 1)
    gamma, beta, dw, db = flat.split([features, features, classes * features, classes])
    return 1 + gamma, beta, dw.view(classes, features), db


def degree(prior: Tensor, source: Tensor) -> Tensor:
    """How much label distributions ``[..., C]`` lean as the source's ``[C]`` does: numbers in [-1, 1], ``[..., 1]``.

    ``sum_c prior_c s_c`` with ``s = log source`` centred and scaled to a largest size of 1: positive where the classes
    that the source has most of are frequent. A balanced source has no direction: 0.
    """
    s = source.log() - source.log().mean()
    largest = s.abs().max()
    return (prior * s / largest).sum(-1, keepdim=True) if largest > 1e-6 else torch.zeros_like(prior[..., :1])


def label_distribution(source: Tensor, generator: Generator, spread: float = 0.0) -> Tensor:
    """One of the distributions ``[C]`` that the adapter learns: ``softmax(t log source + s n)``.

    Args:
        source: ``[C]``; ``t`` is uniform in [-1, 1]: from backward over balanced to forward.
        spread: ``s`` is uniform in [0, spread], ``n`` normal: any classes may be frequent.
    """
    t, s = (2 * torch.rand((), generator=generator) - 1).item(), spread * torch.rand((), generator=generator).item()
    noise = s * torch.randn(len(source), generator=generator) if spread else torch.zeros(len(source))
    return (t * source.log() + noise.to(source)).softmax(0)


def adjusted_loss(logits: Tensor, y: Tensor, prior: Tensor, source: Tensor) -> Tensor:
    """Generalised logit adjustment: ``CE(z + log source - log prior, y)``, the mean over source samples ``[B]``.

    Where it is least, ``softmax(z)`` is ``p(y | x)`` under the label distribution ``prior``.
    """
    return F.cross_entropy(full(logits) + source.log() - prior.log(), y)


class LSA(Method):
    """Label shift adapter around another method (Park et al., ICCV 2023).

    A small network maps the label distribution of the stream, a moving average of predictions, to a scale and shift of
    the features and a change of the classifier. It is trained before the stream on features of source samples, as if
    their classes were more or less frequent, and fixed afterwards; at the source's own label distribution nothing is
    shifted. The method inside works on the shifted logits. Each batch is predicted once without gradients to move the
    average, then the inner step follows: scored is its forward. With ``steps=0`` it is the inner method.

    Args:
        method, arguments: the inner method, by name or class path, and its arguments.
        condition: what the network is told: ``degree`` is one number (:func:`degree`), which needs a source with
            frequent and rare classes; ``prior`` the whole distribution, for any source.
        rate: share of the batch in the moving average, which starts balanced.
        steps, adapter_lr, batch_size: of the training before the stream, by Adam.
        hidden: width of the network, whose last layer has ``hidden * C * D`` weights.
        spread: of :func:`label_distribution` where the whole distribution is told.
    """

    def __init__(
        self, method: str = "TENT", arguments: dict[str, Any] | None = None,
        condition: Literal["degree", "prior"] = "degree", rate: float = 0.1, steps: int = 1000,
        adapter_lr: float = 1e-3, batch_size: int = 128, hidden: int = 32, spread: float = 2.0,
    ) -> None:  # fmt: skip
        if issubclass(method_class(method), LSA):
            raise UDAError("LSA: one around another is no method.")
        self.inner = make_method(method, arguments)
        if self.inner.episodic:
            raise UDAError(f"LSA: {method} forgets after each sample, and would forget the label distribution.")
        if condition not in ("degree", "prior"):
            raise UDAError(f"LSA: condition is 'degree' or 'prior', not {condition!r}.")
        self.condition, self.rate = condition, rate
        self.steps, self.adapter_lr, self.batch_size = steps, adapter_lr, batch_size
        self.hidden, self.spread = hidden, spread if condition == "prior" else 0.0
        self.needs = "domains" if self.inner.needs == "domains" else "labels"
        self.scored = f"{self.inner.scored}, by the shifted classifier"

    def attach(self, a: Adapter) -> None:
        """The shifted classifier and its network, then the inner method."""
        d, c = feature_size(a, "LSA")
        head = a.net.get_submodule(a.head)
        a.replace(lambda m: m is head, lambda m: ShiftedHead(m, d, c))
        with seeded(a):
            told = nn.Linear(1 if self.condition == "degree" else c, self.hidden)
            net = nn.Sequential(told, nn.ReLU(), nn.Linear(self.hidden, size(d, c)))
        for p in net[2].parameters():
            nn.init.zeros_(p)
        a.add("label_shift", net.to(next(a.net.parameters()).dtype))
        self.inner.attach(a)
        if a.net.get_submodule(f"{a.head}.head") is not head:
            raise UDAError(f"LSA: {type(self.inner).__name__} replaces the classifier, which LSA shifts.")

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """The inner method's preparation, then the network, on features of the net that comes out."""
        if self.inner.needs != "nothing":
            self.inner.prepare(a, source)
        net, found = a.extra["label_shift"], []
        with torch.no_grad():
            for batch in source.batches(self.batch_size, a.generator):
                found.append((full(a.features(batch["x"].to(net[0].weight.device))[0]), batch["y"]))
        features, y = (torch.cat(v).to(net[0].weight.device) for v in zip(*found, strict=True))
        counts = torch.bincount(y, minlength=feature_size(a, "LSA")[1]) + 1.0  # a class without samples is rare
        a.prepared["lsa_source"] = known = (counts / counts.sum()).to(features)
        head, parameters = a.net.get_submodule(a.head).head, list(net.requires_grad_().parameters())
        optimizer = torch.optim.Adam(parameters, self.adapter_lr)
        for _ in range(self.steps):
            rows = torch.randint(len(y), (min(self.batch_size, len(y)),), generator=a.generator).to(y.device)
            prior = label_distribution(known, a.generator, self.spread)
            logits = shifted_logits(head, features[rows], *self.shift(a, prior))
            grads = torch.autograd.grad(adjusted_loss(logits, y[rows], prior, known), parameters)
            for p, g in zip(parameters, grads, strict=True):
                p.grad = g
            optimizer.step()
        net.requires_grad_(False).zero_grad(set_to_none=True)
        self._apply(a, torch.full_like(known, 1 / len(known)))

    def shift(self, a: Adapter, prior: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """gamma, beta, dW and db for a label distribution ``[C]``: the identity at the source's own."""
        net, known = a.extra["label_shift"], a.prepared["lsa_source"]
        both = torch.stack([prior, known])
        told = degree(both, known) if self.condition == "degree" else (len(known) * both + 0.1).log()
        here, there = net(told)
        return split(here - there, len(a.net.get_submodule(a.head).gamma))

    @torch.no_grad()
    def _apply(self, a: Adapter, prior: Tensor) -> None:
        """Shift the classifier of the net and of its copies: teachers see the same label distribution."""
        with no_autocast(prior):
            shift = dict(zip(ShiftedHead.NAMES, self.shift(a, prior), strict=True))
        for m in (*a.net.modules(), *a.extra.modules()):
            if isinstance(m, ShiftedHead):
                for name, value in shift.items():
                    getattr(m, name).copy_(value)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The inner method's."""
        return self.inner.predict(a, x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Move the label distribution by the predictions of the batch, shift, and take the inner step."""
        with torch.no_grad():
            p = full(self.inner.predict(a, x)).softmax(1).mean(0)
        known = a.prepared["lsa_source"]
        prior = a.state.get("lsa_prior", torch.full_like(known, 1 / len(known)))
        a.state["lsa_prior"] = prior = torch.lerp(prior, p.to(prior), self.rate)
        self._apply(a, prior)
        logits = self.inner.step(a, x)
        if "lsa_prior" not in a.state:  # the inner method went back to the start, as SAR does where it must
            a.state["lsa_prior"] = prior
            self._apply(a, prior)
        return logits
