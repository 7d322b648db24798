"""RNA: a controller that learned, before the stream, which modulation of a frozen net repairs its prediction."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full, no_autocast
from uda_testtime.adapter import Adapter, Method
from uda_testtime.layers import called, channel_axis, hidden_layers, named_layers, per_sample, told, width, wrap
from uda_testtime.parts import class_prototypes, feature_size, seeded
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import norm_layers
from uda_testtime.warmup import DOMAINS, pseudo_domain, warm_up


class FiLM(nn.Module):
    """``(1 + gamma) y + beta`` of a layer's output ``y``, channel by channel (Perez et al., 2018).

    ``(gamma, beta)`` is a Linear of the sample's embedding, zero at first: nothing changes.

    Args:
        layer: kept as it is; size: of an embedding; scale: False leaves out gamma.

    Attributes:
        embedding: ``[B, size]``, told for a forward; None: no modulation.
    """

    def __init__(self, layer: nn.Module, size: int, scale: bool = True) -> None:
        super().__init__()
        self.layer, self.channels, self.scale = layer, width(layer), scale
        self.coefficients = nn.Linear(size, self.channels * (2 if scale else 1))
        nn.init.zeros_(self.coefficients.weight)
        nn.init.zeros_(self.coefficients.bias)
        self.embedding: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the layer."""
        y = self.layer(*args, **kwargs)
        if self.embedding is None:
            return y
        shape = [len(y), *[1] * (y.dim() - 1)]
        shape[channel_axis(y, self.channels, "RNA")] = self.channels
        parts = per_sample(self.coefficients(self.embedding), y).split(self.channels, 1)
        if self.scale:
            y = y + parts[1].view(shape) * y
        return y + parts[0].view(shape)


class RNA(Method):
    """Rapid network adaptation (Yeo, Kar, Sodagar & Zamir, ICCV 2023), for classification.

    The net stays frozen, with a :class:`FiLM` behind each normalisation layer (hidden layer, in a net without any). A
    controller h sees the net's prediction ``p0 = softmax f(x)`` and a signal s; what counts is ``f(x; e)`` with
    ``e = h(p0, s)``: a second forward in place of an optimisation. Controller and FiLM learn before the stream, by the
    cross-entropy of ``f(x'; e)`` on labelled source samples in pseudo-domains. Along the stream nothing is trained and
    nothing kept.

    Scored: the second forward.

    Args:
        lr, epochs, batch_size: of the controller's training by Adam with AMSGrad (published: 3e-5, batches of 64, up to
            5,000 epochs); lr or epochs 0: no modulation. weight_decay: of it.
        signal: ``entropy`` of p0, over its maximum; ``prototypes``: cosines of the features with source class means.
        groups: the coarse class of each class, for a signal given beside the batch: ``a(x, side={"coarse": y})``, ``y``
            ``[B]`` with -1 for unknown. In training each sample has it with probability ``keep``. None: no such signal.
        keep: see groups. hidden: units of the controller, and size of the embedding.
        domains: pseudo-domains, the source included, 1 to 5 (:mod:`uda_testtime.warmup`).
        scale: False: additive only, as in the authors' released code. loops: how often controller and net take turns.
        layers: names of the modules that are modulated; None: see above.

    Raises:
        UDAError: no layer to modulate, an argument out of range, or coarse classes that do not fit.
    """

    needs, scored = "labels", "the second forward, without an update"

    def __init__(
        self, lr: float = 1e-3, epochs: int = 10, batch_size: int = 64, weight_decay: float = 2e-6,
        signal: Literal["entropy", "prototypes"] = "entropy", groups: list[int] | None = None, keep: float = 0.5,
        hidden: int = 64, domains: int = DOMAINS, scale: bool = True, loops: int = 1, layers: list[str] | None = None,
    ) -> None:  # fmt: skip
        if signal not in ("entropy", "prototypes"):
            raise UDAError(f"RNA: signal is 'entropy' or 'prototypes', not {signal!r}.")
        if not 1 <= domains <= DOMAINS or loops < 1 or not 0 <= keep <= 1:
            given = f"{domains}, {loops}, {keep}"
            raise UDAError(f"RNA: domains is 1 to {DOMAINS}, loops at least 1, keep in [0, 1], not {given}.")
        if groups is not None and sorted(set(groups)) != list(range(len(set(groups)))):
            raise UDAError(f"RNA: groups are numbers from 0 without a gap, one a class, not {groups}.")
        self.lr, self.epochs, self.batch_size, self.weight_decay = lr, epochs, batch_size, weight_decay
        self.signal, self.groups, self.keep, self.hidden = signal, groups, keep, hidden
        self.domains, self.scale, self.loops, self.layers = domains, scale, loops, layers

    def attach(self, a: Adapter) -> None:
        """Modulation and controller."""
        if self.layers is not None:
            chosen = named_layers(a.net, self.layers, "RNA")
        else:
            chosen = called(a.net, norm_layers(a.net)) or hidden_layers(a.net, a.head)
        if not chosen:
            raise UDAError("RNA: the model has no normalisation and no hidden layer to modulate.")
        _, c = feature_size(a, "RNA")
        if self.groups is not None and len(self.groups) != c:
            raise UDAError(f"RNA: groups names {len(self.groups)} classes, the model has {c}.")
        like = next(a.net.parameters())
        inputs = c + (1 if self.signal == "entropy" else c) + (max(self.groups) + 1 if self.groups else 0)
        with seeded(a):
            wrap(a, chosen, lambda layer: FiLM(layer, self.hidden, self.scale).to(like).requires_grad_(False))
            controller = nn.Sequential(
                nn.Linear(inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.hidden), nn.ReLU()
            ).to(like)  # fmt: skip
        a.add("controller", controller)

    def signals(self, a: Adapter, features: Tensor, logits: Tensor, coarse: Tensor | None) -> Tensor:
        """What the controller sees ``[B, I]``: probabilities, signal, coarse class (zeros: unknown)."""
        with no_autocast(logits):
            p = full(logits).softmax(1)
            if self.signal == "entropy":
                out = [p, torch.special.entr(p).sum(1, keepdim=True) / math.log(p.shape[1])]
            else:
                means = F.normalize(a.prepared["prototypes"].to(p), dim=1)
                out = [p, F.normalize(full(features).flatten(1), dim=1) @ means.T]
            if self.groups:
                known = torch.zeros(len(p), max(self.groups) + 1, device=p.device, dtype=p.dtype)
                if coarse is not None:
                    known[coarse >= 0] = F.one_hot(coarse[coarse >= 0], known.shape[1]).to(p)
                out.append(known)
            return torch.cat(out, 1)

    def modulated(self, a: Adapter, x: Tensor, coarse: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]`` after ``loops`` turns of controller and net; gradients reach the last turn alone."""
        with torch.no_grad():
            features, logits = a.features(x)
        for _ in range(self.loops):
            embedding = a.extra["controller"](self.signals(a, features.detach(), logits.detach(), coarse))
            with told(FiLM, a.net, embedding=embedding):
                features, logits = a.features(x)
        return logits

    def warm_up_loss(self, a: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """Of source samples ``x`` of classes ``y``, in a pseudo-domain drawn for the batch."""
        x, coarse = pseudo_domain(a, x, int(torch.randint(self.domains, (), generator=a.generator))), None
        if self.groups:
            known = (torch.rand(len(y), generator=a.generator) < self.keep).to(y.device)
            coarse = torch.where(known, torch.tensor(self.groups, device=y.device)[y], -1)
        return F.cross_entropy(self.modulated(a, x, coarse), y)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Prototypes where the signal takes them, then the controller's training."""
        if self.signal == "prototypes":
            a.prepared["prototypes"] = class_prototypes(a, source, self.batch_size)
        films = [m for m in a.net.modules() if isinstance(m, FiLM)]
        parts = [p for m in films for p in m.coefficients.parameters()] + list(a.extra["controller"].parameters())
        warm_up(
            a, source, parts, lambda x, y: self.warm_up_loss(a, x, y), self.epochs, self.lr, self.batch_size,
            weight_decay=self.weight_decay, amsgrad=True,
        )  # fmt: skip

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The modulated logits."""
        coarse = a.side.get("coarse")
        if coarse is not None:
            if not self.groups:
                raise UDAError("RNA: coarse classes came beside the batch: name the group of each class (groups).")
            coarse = torch.as_tensor(coarse, device=x.device).long()
            if coarse.shape != (len(x),) or not -1 <= int(coarse.min()) <= int(coarse.max()) <= max(self.groups):
                what, given = f"{len(x)} numbers from -1 (unknown) to {max(self.groups)}", coarse.flatten()[:5].tolist()
                raise UDAError(f"RNA: side['coarse'] is {what}, not of shape {tuple(coarse.shape)}: {given}...")
        with torch.no_grad():
            return self.modulated(a, x, coarse)
