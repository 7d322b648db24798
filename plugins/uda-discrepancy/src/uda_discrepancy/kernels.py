"""Gaussian kernels and the maximum mean discrepancy, vectorised, in full precision.

``n`` source and ``m`` target samples are handled as their union: distances and kernels are ``[n + m, n + m]``, the
source first, so that one bandwidth belongs to all pairs. Everything runs in float32 (float64 for float64 inputs)
with autocast off.
"""

from __future__ import annotations

import torch
from torch import Tensor

import uda
from uda.nn import full, no_autocast

#: Estimates of the MMD from a kernel matrix; see :func:`discrepancy`.
ESTIMATORS = ("linear", "circular", "unbiased", "biased")


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2``, ``[n, F]``, ``[m, F]`` -> ``[n, m]``."""
    with no_autocast(x):
        x, y = full(x), full(y)
        centre = torch.cat([x, y]).mean(0).detach()  # distances stay, and less cancels in the difference below
        x, y = x - centre, y - centre
        return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def mean_distance(distances: Tensor) -> Tensor:
    """Mean over the ordered pairs of distinct samples of ``[n, n]``, as a constant: no gradient.

    Where all samples coincide it is a tiny positive number, so that kernels stay finite.
    """
    n = len(distances)
    mean = distances.detach().sum() / max(n * n - n, 1)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny ** 0.5)


def gaussian_kernel(distances: Tensor, variance: Tensor | float, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """Sum of Gaussian kernels ``sum_a exp(-D / (2 alpha_a variance))``.

    ``alpha_a = factor^(a - kernels // 2) / 2`` for a = 0 ... kernels - 1: with five kernels and factor 2 these are
    2^-3 ... 2^1, with one kernel and variance 2 s^2 it is ``exp(-D / (2 s^2))``.

    Args:
        distances: squared distances; variance: a number or what broadcasts to the distances.
    """
    total = torch.zeros_like(distances)
    for a in range(kernels):
        total = total + torch.exp(-distances / (factor ** (a - kernels // 2) * variance))
    return total


def adaptive_kernel(x: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """:func:`gaussian_kernel` of all pairs of ``x`` ``[n, F]``, its variance their (constant) mean distance."""
    distances = squared_distances(x, x)
    return gaussian_kernel(distances, mean_distance(distances), kernels, factor)


def _pairs(k: Tensor, s: Tensor, t: Tensor, partner: Tensor) -> Tensor:
    """Mean of ``k(s, s') + k(t, t') - k(s, t') - k(s', t)`` over given positions, the primed ones at ``partner``."""
    s2, t2 = s[partner], t[partner]
    return (k[s, s2] + k[t, t2] - k[s, t2] - k[s2, t]).mean()


def discrepancy(kernel: Tensor, n: int, estimator: str = "unbiased") -> Tensor:
    """Squared MMD from a kernel matrix of the union (Gretton et al., JMLR 2012).

    Args:
        kernel: ``[n + m, n + m]``, the source's rows first.
        n: number of source samples.
        estimator: ``biased``: ``mean K_ss + mean K_tt - 2 mean K_st``, never negative. ``unbiased``: without the
            diagonals of K_ss and K_tt. ``linear``: the mean over disjoint quadruples (s_1, s_2, t_1, t_2),
            (s_3, s_4, ...) of ``k(s_1, s_2) + k(t_1, t_2) - k(s_1, t_2) - k(s_2, t_1)`` (Long et al. 2015, equation
            4). ``circular``: the same over all neighbours (i, i + 1) in a circle. The last two take equally many
            samples of each domain, spread evenly over the rows where one has more. All but ``biased`` may be negative.

    Raises:
        uda.UDAError: unknown estimator, or fewer than two samples of a domain for one that takes pairs.
    """
    m = len(kernel) - n
    check_choice("estimator", estimator, ESTIMATORS)
    with no_autocast(kernel):
        ss, tt, st = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
        if estimator == "biased":
            return ss.mean() + tt.mean() - 2 * st.mean()
        if min(n, m) < 2:
            raise uda.UDAError(
                f"The {estimator} MMD needs two samples of each domain, got {n} and {m}: raise the batch size, or take "
                "the estimator 'biased'."
            )
        if estimator == "unbiased":
            inner = (ss.sum() - ss.trace()) / (n * (n - 1)) + (tt.sum() - tt.trace()) / (m * (m - 1))
            return inner - 2 * st.mean()
        count = torch.arange(min(n, m), device=kernel.device)
        s, t = count * n // len(count), n + count * m // len(count)
        if estimator == "circular":
            return _pairs(kernel, s, t, torch.roll(count, -1))
        half = len(count) // 2
        first = count[: 2 * half].view(half, 2)
        return _pairs(kernel, s[first.flatten()], t[first.flatten()], first.flip(1).flatten())


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse an unknown value of an option.

    Raises:
        uda.UDAError: with the choices.
    """
    if value not in choices:
        raise uda.UDAError(f"Unknown {name} {value!r}: choose from {', '.join(choices)}.")
