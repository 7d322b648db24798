"""Entropy minimisation over reliable samples: ETA (EATA without its Fisher term) and SAR."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.losses import entropy
from uda.nn import full
from uda_testtime.adapter import Adapter
from uda_testtime.methods import TENT
from uda_testtime.surgery import MixedNorm, norm_layers, norm_parameters


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


def top_layers(names: Sequence[str], share: float = 0.25) -> list[str]:
    """Normalisation layers near the output, which SAR leaves alone.

    Args:
        names: of all of them, in order; share: of the layers, where the network has none that the authors name.

    Returns:
        Those below ``layer4`` of a ResNet; ``blocks.9`` to ``blocks.11`` and the last ``norm`` of a transformer of
        twelve blocks; of other networks the last ``share`` of the layers, rounded down.
    """
    if found := [n for n in names if "layer4" in n.split(".")]:
        return found
    blocks = [(n, m[1], int(m[2])) for n in names if (m := re.match(r"((?:.*\.)?)blocks\.(\d+)\.", n))]
    stems = {stem for _, stem, _ in blocks}
    if len(stems) == 1 and max(i for *_, i in blocks) == 11:
        last = f"{next(iter(stems))}norm"
        return [n for n, _, i in blocks if i >= 9] + [n for n in names if n == last]
    return list(names[len(names) - int(share * len(names)) :])


class SAR(TENT):
    """Sharpness-aware entropy minimisation over certain samples, with recovery (Niu et al., 2023).

    Scored: the logits before the update. The normalisation layers near the output are left alone.

    Args:
        lr, optimizer, weight, source_weight: as in :class:`TENT`.
        margin: as in :class:`ETA`; rho: radius of the ascent step.
        recovery: the model goes back to the source when the moving average of the loss falls below; 0: never.
        skip: names of layers, or of modules above them, that are left alone; None: those that :func:`top_layers`
            finds, with ``skip_last`` as its share; an empty list: none.
        skip_last: share of the layers, in [0, 1); 0: where the network has none that the authors name, none.
    """

    def __init__(
        self, lr: float = 2.5e-4, optimizer: str = "sgd", weight: float = 1.0, source_weight: float = 0.0,
        margin: float = 0.4, rho: float = 0.05, recovery: float = 0.2, skip: list[str] | None = None,
        skip_last: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight)
        if not 0 <= skip_last < 1:
            raise UDAError(f"SAR: skip_last is a share in [0, 1), not {skip_last}.")
        self.margin, self.rho, self.recovery, self.skip, self.skip_last = margin, rho, recovery, skip, skip_last

    def trained(self, net: nn.Module) -> list[nn.Parameter]:
        """Scale and shift of the normalisation layers that are not skipped.

        Raises:
            UDAError: a name of ``skip`` that no layer has, or no layer left.
        """
        names = list(norm_layers(net))
        if self.skip is None:
            return norm_parameters(net, top_layers(names, self.skip_last))
        below = {s: [n for n in names if f".{s}." in f".{n}."] for s in self.skip}
        if missing := [s for s, found in below.items() if not found]:
            raise UDAError(f"SAR: no normalisation layer is named {missing[0]!r} or lies below it; there are {names}.")
        left = norm_parameters(net, [n for found in below.values() for n in found])
        if names and not left:
            raise UDAError(f"SAR: skip={self.skip} leaves no normalisation layer to train.")
        return left

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
        return any(isinstance(m, MixedNorm) and m.source_weight < 1 for m in a.net.modules())
