"""BECoTTA: low-rank experts, routed by the domain that a sample seems to come from."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda_testtime.adapter import Adapter, Method
from uda_testtime.layers import first_inputs, hidden_layers, named_layers, residual_blocks, told, wrap
from uda_testtime.mode import MoDE, mutual_information
from uda_testtime.parts import cross_entropy, keep_start, restore_at_random, seeded
from uda_testtime.source import SourceSamples
from uda_testtime.surgery import mix_statistics
from uda_testtime.warmup import DOMAINS, pseudo_domain, warm_up


def domain_discriminator(net: nn.Module, domains: int) -> nn.Sequential:
    """From the model's inputs to logits of ``domains``: two convolutions, or a hidden layer of 32 on rows."""
    convolutional, inputs = first_inputs(net)
    if convolutional:
        body = [nn.Conv2d(inputs, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        body.append(nn.AdaptiveAvgPool2d(1))
    else:
        body = [nn.Flatten(), nn.Linear(inputs, 32), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(32, domains)).to(next(net.parameters()))


class BECoTTA(Method):
    """Input-dependent online blending of experts (Lee, Yoon & Hwang, ICML 2024).

    Behind each residual block (or hidden layer, in a net without any) comes a :class:`~uda_testtime.mode.MoDE`. Before
    the stream, experts, routers and a discriminator of domains learn on labelled source samples and copies of them in
    pseudo-domains: ``CE + domain_weight * CE_domain - synergy * sum over layers of I(domain; expert)``. Along the
    stream the discriminator names each sample's router; experts and routers alone minimise the entropy H of samples
    with ``H < margin ln C``; then weights go back to their start at random.

    Scored: the logits before the update.

    Args:
        lr: learning rate; optimizer: ``adam`` or ``sgd``; weight: of the entropy; margin: of kept samples.
        restore: probability of each trained weight to go back.
        domains: pseudo-domains, the source included, 2 to 5 (:mod:`uda_testtime.warmup`).
        experts, top: of a layer, and how many of them a sample gets; rank: of an expert.
        layers: names of the modules that get experts; None: all residual blocks, else all hidden layers.
        domain_weight, synergy: of the warm-up. epochs, source_lr, batch_size: of it, by Adam; a step sees ``domains``
            times ``batch_size`` samples; 0 epochs: none.
        source_weight: share of the source's BatchNorm statistics.
        compat: route as the authors' released code does (:class:`~uda_testtime.mode.MoDE`): no router learns.

    Raises:
        UDAError: no layer for experts, or an argument out of range.
    """

    needs, scored = "labels", "before the update"

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, margin: float = 0.4,
        restore: float = 0.01, domains: int = 4, experts: int = 4, top: int = 3, rank: int = 6,
        layers: list[str] | None = None, domain_weight: float = 0.1, synergy: float = 5e-4, epochs: int = 3,
        source_lr: float = 1e-3, batch_size: int = 64, source_weight: float = 1.0, compat: bool = False,
    ) -> None:  # fmt: skip
        if not 2 <= domains <= DOMAINS:
            raise UDAError(f"BECoTTA: domains lies between 2 and {DOMAINS}, not {domains}.")
        if not 1 <= top <= experts or rank < 1:
            given = f"{top}, {experts}, {rank}"
            raise UDAError(f"BECoTTA: top lies between 1 and experts, rank is at least 1, not {given}.")
        self.lr, self.optimizer, self.weight, self.margin, self.restore = lr, optimizer, weight, margin, restore
        self.domains, self.experts, self.top, self.rank, self.layers = domains, experts, top, rank, layers
        self.domain_weight, self.synergy, self.epochs, self.source_lr = domain_weight, synergy, epochs, source_lr
        self.batch_size, self.source_weight, self.compat = batch_size, source_weight, compat

    def attach(self, a: Adapter) -> None:
        """Experts, routers and the discriminator."""
        if self.layers is not None:
            chosen = named_layers(a.net, self.layers, "BECoTTA")
        else:
            chosen = residual_blocks(a.net, a.head) or hidden_layers(a.net, a.head)
        if not chosen:
            raise UDAError("BECoTTA: the model has no residual block and no hidden layer to put experts behind.")
        with seeded(a):
            discriminator = domain_discriminator(a.net, self.domains)
            wrap(a, chosen, lambda m: MoDE(m, self.domains, self.experts, self.rank, self.top, self.compat))
        mix_statistics(a, self.source_weight)
        a.add("discriminator", discriminator)
        a.train_parameters(self._own(a), self.optimizer, self.lr)
        keep_start(a)

    @staticmethod
    def _own(a: Adapter) -> list[nn.Parameter]:
        return [p for m in a.net.modules() if isinstance(m, MoDE) for p in m.own()]

    def warm_up_loss(self, a: Adapter, x: Tensor, y: Tensor) -> Tensor:
        """Of source samples ``x`` ``[B, ...]`` of classes ``y`` in all pseudo-domains."""
        n, routed = len(x), []
        x = torch.cat([pseudo_domain(a, x, d) for d in range(self.domains)])
        domain = torch.arange(self.domains, device=x.device).repeat_interleave(n)
        with told(MoDE, a.net, domain=domain, noise=a.generator, record=routed):
            loss = F.cross_entropy(a.net(x), y.repeat(self.domains))
        loss = loss + self.domain_weight * F.cross_entropy(a.extra["discriminator"](x), domain)
        return loss - self.synergy * sum(mutual_information(r.unflatten(0, (self.domains, -1)).mean(1)) for r in routed)

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Experts, routers and discriminator learn on the source; weights go back to what comes out."""
        parts = self._own(a) + list(a.extra["discriminator"].parameters())
        warm_up(a, source, parts, lambda x, y: self.warm_up_loss(a, x, y), self.epochs, self.source_lr, self.batch_size)
        a.train_parameters(self._own(a), self.optimizer, self.lr)
        keep_start(a)

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The net's logits, each sample by the router of its domain."""
        with torch.no_grad():
            domain = a.extra["discriminator"](x).argmax(1)
        with told(MoDE, a.net, domain=domain, noise=a.generator if self.compat else None):
            return a.net(x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """The logits, and one step on the entropy of those that are certain."""
        logits = self.predict(a, x)
        entropy = cross_entropy(logits, logits)
        kept = entropy.detach() < self.margin * math.log(logits.shape[1])
        if bool(kept.any()):
            a.update(self.weight * entropy[kept].mean())
            restore_at_random(a, list(a.extra["start"]), self.restore)
        return logits
