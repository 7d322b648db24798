"""Entropy minimisation over reliable samples: ETA (EATA without its Fisher term) and SAR."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.losses import entropy
from uda.nn import full
from uda_testtime.adapter import Adapter
from uda_testtime.methods import TENT


class ETA(TENT):
    """Entropy of certain and non-redundant samples (Niu et al., 2022), without the anti-forgetting Fisher term.

    Scored: the logits before the update. A batch without a kept sample changes nothing.

    Args:
        lr, optimizer, weight, source_weight: as in :class:`TENT`.
        margin: samples of entropy below ``margin * ln C`` are kept.
        redundancy: largest cosine with the moving average of kept predictions (0.4 CIFAR-10, 0.05 ImageNet).
    """

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, source_weight: float = 0.0,
        margin: float = 0.4, redundancy: float = 0.4,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight)
        self.margin, self.redundancy = margin, redundancy

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, then a step on the kept samples, weighted by ``exp(E0 - H)``."""
        logits = a.net(x)
        h, limit = entropy(logits), self.margin * math.log(logits.shape[1])
        with torch.no_grad():
            p, keep, mean = full(logits).softmax(1), h < limit, a.state.get("mean")
            if mean is not None:
                keep = keep & (F.cosine_similarity(p, mean[None], dim=1).abs() < self.redundancy)
            if keep.any():
                kept = p[keep].mean(0)
                a.state["mean"] = kept if mean is None else 0.9 * mean + 0.1 * kept
        if keep.any():
            a.update(self.weight * ((limit - h[keep]).exp().detach() * h[keep]).mean() + self.penalty(a))
        return logits

    def penalty(self, a: Adapter) -> Tensor | float:
        """What holds the parameters: nothing."""
        return 0.0


class SAR(TENT):
    """Sharpness-aware entropy minimisation over certain samples, with recovery (Niu et al., 2023).

    Scored: the logits before the update. All normalisation layers are trained; the paper leaves the top ones alone.

    Args:
        lr, optimizer, weight, source_weight: as in :class:`TENT`.
        margin: as in :class:`ETA`; rho: radius of the ascent step.
        recovery: the model goes back to the source when the moving average of the loss falls below; 0: never.
    """

    def __init__(
        self, lr: float = 2.5e-4, optimizer: str = "sgd", weight: float = 1.0, source_weight: float = 0.0,
        margin: float = 0.4, rho: float = 0.05, recovery: float = 0.2,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight)
        self.margin, self.rho, self.recovery = margin, rho, recovery

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits; ascend by rho along the gradient, and step with the gradient found there."""
        logits = a.net(x)
        h, limit = entropy(logits), self.margin * math.log(logits.shape[1])
        if not (keep := h.detach() < limit).any():
            return logits
        grads = torch.autograd.grad(self.weight * h[keep].mean(), a.parameters)
        norm = torch.stack([g.norm() for g in grads]).norm()
        old = [p.detach().clone() for p in a.parameters]
        with torch.no_grad():
            for p, g in zip(a.parameters, grads, strict=True):
                p.add_(g * (self.rho / (norm + 1e-12)))
        second = entropy(a.net(x[keep]) if not self._mixes(a) else a.net(x)[keep])
        inner = second.detach() < limit
        loss = self.weight * second[inner].mean() if inner.any() else None
        new = torch.autograd.grad(loss, a.parameters) if loss is not None else None
        with torch.no_grad():  # back before the step, by copies: bit for bit
            for p, q in zip(a.parameters, old, strict=True):
                p.copy_(q)
        if new is not None:
            for p, g in zip(a.parameters, new, strict=True):
                p.grad = g
            a.optimizer.step()
            a.updates += 1
            value = float(loss.detach())
            e = a.state.get("loss")
            a.state["loss"] = value if e is None else 0.9 * e + 0.1 * value
            if self.weight and a.state["loss"] < self.recovery * self.weight:
                a.reset_weights()
        return logits

    @staticmethod
    def _mixes(a: Adapter) -> bool:
        """Whether samples see each other by batch statistics: the second forward then takes the whole batch, too."""
        from uda_testtime.surgery import MixedNorm

        return any(isinstance(m, MixedNorm) and m.source_weight < 1 for m in a.net.modules())
