"""Joining the updates of clients: federated averaging, FedDA and FedGP (Jiang, Zhang and Koyejo, ICLR 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from uda.errors import UDAError, check_choice

State = dict[str, Tensor]
RULES = ("fedavg", "fedda", "fedgp")


def difference(one: State, other: State) -> State:
    """``one - other``, entries of floating point alone."""
    return {k: one[k] - other[k] for k in one if one[k].is_floating_point()}


def projected(target: Tensor, source: Tensor) -> Tensor:
    """The target's update projected on a source's, where they agree: ``max(<t, s>, 0) s / |s|^2``."""
    return source * ((target * source).sum().clamp_min(0) / source.square().sum().clamp_min(1e-24))


def joined(
    target: State, sources: Sequence[State], shares: Sequence[float], beta: Sequence[float] | float, rule: str = "fedgp"
) -> State:
    """One update from those of the target and of M sources.

    ``fedda``: ``sum_i a_i ((1 - b_i) g_T + b_i g_i)``. ``fedgp``: the same with ``g_T`` projected on ``g_i`` for
    ``g_i``, tensor by tensor. ``fedavg``: ``sum_i a_i g_i``, the sources alone.

    Args:
        target, sources: updates by name; shares: a ``[M]``, made to sum 1; beta: b, one or ``[M]``.
    """
    check_choice("Federation", "rule", rule, RULES)
    b = [beta] * len(sources) if isinstance(beta, int | float) else list(beta)
    total = sum(shares)
    out = {}
    for name, t in target.items():
        value = torch.zeros_like(t)
        for source, share, own in zip(sources, shares, b, strict=True):
            s = source[name]
            if rule == "fedavg":
                value = value + share / total * s
                continue
            towards = projected(t, s) if rule == "fedgp" else s
            value = value + share / total * ((1 - own) * t + own * towards)
        out[name] = value
    return out


def moved(start: State, change: State, counters: State) -> State:
    """``start + change``; entries that are no floats (BatchNorm's counters) are those of ``counters``."""
    return {k: v + change[k] if k in change else counters[k] for k, v in start.items()}


def flat(update: State) -> Tensor:
    """All entries in one vector, float64."""
    return torch.cat([u.double().flatten() for u in update.values()])


def auto_beta(target: Sequence[State], source: State, rule: str = "fedgp") -> float:
    """How much a source may count, from the noise of the target's updates and their distance to the source's.

    With N updates of the target from a batch each, their variance ``v = var / N`` of the mean (all in units of one
    dimension), FedDA: ``b = v / (v + d^2)``, ``d^2 = max(mean_n |g_n - g_i|^2 - var, 0)``. FedGP takes for d^2 what the
    projection on g_i leaves of the g_n, less its own variance.

    Args:
        target: N updates, 2 or more; source: its mean update.

    Raises:
        UDAError: fewer than two updates, which have no variance; a rule that has no weights.
    """
    check_choice("auto_beta", "rule", rule, ("fedda", "fedgp"))
    if len(target) < 2:
        raise UDAError("auto_beta needs the updates of two target batches or more: their spread is their noise.")
    g, s = torch.stack([flat(u) for u in target]), flat(source)
    n, size = g.shape
    noise = float((g - g.mean(0)).square().sum()) / (n - 1) / size
    if rule == "fedda":
        rest, rest_noise = g - s, noise
    else:
        along = (g @ s / s.square().sum().clamp_min(1e-300))[:, None] * s
        rest = g - along
        rest_noise = float((rest - rest.mean(0)).square().sum()) / (n - 1) / size
    bias = max(float(rest.square().sum()) / n / size - rest_noise, 0.0)
    variance = noise / n
    return variance / (variance + bias) if variance + bias > 0 else 0.5
