"""Gaussian kernels and the maximum mean discrepancy (MMD) as pure functions, vectorised, in full precision.

``n`` source and ``m`` target samples are handled as their union: distances and kernels are ``[n + m, n + m]``, the
source first, so that one bandwidth belongs to all pairs. Everything runs in float32 (float64 for float64 inputs)
with autocast off.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from uda.errors import UDAError, check_choice
from uda.nn.precision import full, no_autocast

#: Estimates of the MMD from a kernel matrix; see :func:`discrepancy`.
ESTIMATORS = ("biased", "unbiased", "linear", "circular")


def squared_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``|x_i - y_j|^2``, ``[n, F]``, ``[m, F]`` -> ``[n, m]``; among the rows of ``x`` without ``y``."""
    with no_autocast(x):
        x = full(x)
        rows = x if y is None else torch.cat([x, full(y)])
        centre = rows.mean(0).detach()  # distances stay, and less cancels in the difference below
        x = x - centre
        y = x if y is None else full(y) - centre
        return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_min(0)


def mean_distance(distances: Tensor) -> Tensor:
    """Mean over the ordered pairs of distinct samples of ``[n, n]``, as a constant: no gradient.

    Where all samples coincide it is a tiny positive number, so that kernels stay finite.
    """
    n = len(distances)
    mean = distances.detach().sum() / max(n * n - n, 1)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny ** 0.5)


def gaussian_kernel(distances: Tensor, bandwidth: Tensor | float, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """Sum of Gaussian kernels ``sum_a exp(-D / (b factor^a))`` for ``kernels`` values of a around 0.

    a is -2 ... 2 for five kernels. In the notation of Long et al. (2015), ``exp(-D / (2 alpha b))``, these are alpha =
    2^-3 ... 2^1; one kernel with b = 2 s^2 is ``exp(-D / (2 s^2))``.

    Args:
        distances: squared distances D, of any shape.
        bandwidth: b, in units of D: a number, or what broadcasts to the distances.
        kernels: number of kernels; factor: ratio of their bandwidths.
    """
    with no_autocast(distances):
        total = torch.zeros_like(distances)
        for a in range(kernels):
            total = total + torch.exp(-distances / (factor ** (a - kernels // 2) * bandwidth))
        return total


def adaptive_kernel(x: Tensor, kernels: int = 5, factor: float = 2.0) -> Tensor:
    """:func:`gaussian_kernel` of all pairs of ``x`` ``[n, F]``, its bandwidth their (constant) mean distance."""
    distances = squared_distances(x)
    return gaussian_kernel(distances, mean_distance(distances), kernels, factor)


def discrepancy(
    kernel: Tensor,
    n: int,
    estimator: str = "biased",
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Squared MMD from a kernel matrix of the union (Gretton et al., JMLR 2012).

    Args:
        kernel: ``[n + m, n + m]``, the source's rows first.
        n: number of source samples.
        estimator: ``biased``: ``mean K_ss + mean K_tt - 2 mean K_st``, never negative. ``unbiased``: without the
            diagonals of K_ss and K_tt. ``linear``: the mean over disjoint quadruples (s_1, s_2, t_1, t_2),
            (s_3, s_4, ...) of ``k(s_1, s_2) + k(t_1, t_2) - k(s_1, t_2) - k(s_2, t_1)`` (Long et al. 2015, equation
            4). ``circular``: the same over all neighbours (i, i + 1) in a circle. The last two take equally many
            samples of each domain, spread evenly over the rows where one has more. All but ``biased`` may be negative.
        source_weight: for ``biased``, non-negative weights ``[n]`` of the samples in the means, or ``[K, n]`` for K
            weighted pairs over the same samples, such as one a class; target_weight: ``[m]`` or ``[K, m]``. They need
            not sum to 1. A pair with a side that weighs nothing is 0.

    Returns:
        A scalar, or ``[K]`` where the weights have K rows.

    Raises:
        uda.UDAError: unknown estimator, one that takes no weights, or fewer than two samples of a domain for one that
            takes pairs.
    """
    m = len(kernel) - n
    check_choice("MMD", "estimator", estimator, ESTIMATORS)
    if estimator != "biased" and (source_weight is not None or target_weight is not None):
        raise UDAError(f"The estimator {estimator!r} of the MMD takes no sample weights: use 'biased'.")
    if estimator != "biased" and min(n, m) < 2:
        raise UDAError(
            f"The {estimator} MMD needs two samples of each domain, got {n} and {m}: raise the batch size, or take "
            "the estimator 'biased'."
        )
    with no_autocast(kernel):
        if estimator == "biased":
            signed = _signed_shares(kernel.new_ones(n), kernel.new_ones(m), source_weight, target_weight)
            return ((signed @ kernel) * signed).sum(-1)
        if estimator == "unbiased":
            ss, tt, st = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
            inner = (ss.sum() - ss.trace()) / (n * (n - 1)) + (tt.sum() - tt.trace()) / (m * (m - 1))
            return inner - 2 * st.mean()
        count = torch.arange(min(n, m), device=kernel.device)
        s, t = count * n // len(count), n + count * m // len(count)
        if estimator == "circular":
            return _pairs(kernel, s, t, torch.roll(count, -1))
        half = len(count) // 2
        first = count[: 2 * half].view(half, 2)
        return _pairs(kernel, s[first.flatten()], t[first.flatten()], first.flip(1).flatten())


def _pairs(k: Tensor, s: Tensor, t: Tensor, partner: Tensor) -> Tensor:
    """Mean of ``k(s, s') + k(t, t') - k(s, t') - k(s', t)`` over given positions, the primed ones at ``partner``."""
    s2, t2 = s[partner], t[partner]
    return (k[s, s2] + k[t, t2] - k[s, t2] - k[s2, t]).mean()


def _signed_shares(
    source: Tensor, target: Tensor, source_weight: Tensor | None, target_weight: Tensor | None
) -> Tensor:
    """``(u, -v)`` ``[..., n + m]`` with u and v of sum 1, equal where no weight is given; 0 where a side is empty."""
    u = source if source_weight is None else source_weight.to(source)
    v = target if target_weight is None else target_weight.to(target)
    for side, given, samples in (("source", u, len(source)), ("target", v, len(target))):
        if given.shape[-1:] != (samples,) or given.ndim > 2:
            raise UDAError(
                f"{side}_weight has the shape {tuple(given.shape)}: give [{samples}], one weight a sample, or [K, "
                f"{samples}]."
            )
    rows = torch.broadcast_shapes(u.shape[:-1], v.shape[:-1])
    mass_u, mass_v = u.sum(-1, keepdim=True), v.sum(-1, keepdim=True)
    least = torch.finfo(u.dtype).tiny
    u, v = u / mass_u.clamp_min(least), v / mass_v.clamp_min(least)
    signed = torch.cat([u.expand(*rows, -1), -v.expand(*rows, -1)], dim=-1)
    return signed * ((mass_u > 0) & (mass_v > 0))


def multi_kernel_mmd(
    source: Tensor,
    target: Tensor,
    estimator: str = "biased",
    kernels: int = 5,
    factor: float = 2.0,
    bandwidth: Tensor | float | None = None,
    source_weight: Tensor | None = None,
    target_weight: Tensor | None = None,
) -> Tensor:
    """Squared MMD with a sum of Gaussian kernels (Gretton et al., 2012; Long et al., 2015, equations 2 to 4).

    Args:
        source: ``[n, F]``; target: ``[m, F]``.
        estimator: see :func:`discrepancy`.
        kernels, factor: number of kernels and ratio of their bandwidths; see :func:`gaussian_kernel`.
        bandwidth: of the kernel in the middle; None is the mean squared distance of all pairs of both domains, a
            constant of the step.
        source_weight, target_weight: ``[n]`` and ``[m]``, or ``[K, n]`` and ``[K, m]``; see :func:`discrepancy`.

    Returns:
        A scalar, or ``[K]`` where the weights have K rows.
    """
    distances = squared_distances(torch.cat([source, target]))
    bandwidth = mean_distance(distances) if bandwidth is None else bandwidth
    kernel = gaussian_kernel(distances, bandwidth, kernels, factor)
    return discrepancy(kernel, len(source), estimator, source_weight, target_weight)


def contrastive_discrepancy(
    source: Tensor, y: Tensor, target: Tensor, pseudo: Tensor, classes: int, kernels: int = 5, factor: float = 2.0
) -> Tensor:
    """Class-aware MMD within classes minus that between classes (Kang et al. 2019, equations 3 to 5).

    ``CDD = mean_c D(c, c) - mean_{c != c'} D(c, c')`` with D(c, c') the (biased) squared MMD between the source
    samples of class c and the target samples of class c', over the classes that both domains have in the batch. Each
    pair of classes has kernels of its own width: the mean squared distance of the samples of the pair, a constant.

    Args:
        source: ``[n, F]`` with classes ``y`` ``[n]``; target: ``[m, F]`` with pseudo-labels ``pseudo`` ``[m]``. A
            negative label leaves a sample out.
        classes: C.
        kernels, factor: number of kernels and ratio of their variances.

    Returns:
        Scalar; 0 (with a graph) where the domains have no class in common.
    """
    with no_autocast(source):
        source, target = full(source), full(target)
        both = [F.one_hot(labels.clamp_min(0), classes) * (labels >= 0)[:, None] for labels in (y, pseudo)]
        a, b = (x.to(source.dtype) for x in both)  # memberships [n, C], [m, C]
        active = (a.sum(0) > 0) & (b.sum(0) > 0)
        a, b = a * active, b * active
        ss, tt, st = squared_distances(source), squared_distances(target), squared_distances(source, target)
        with torch.no_grad():  # width of the pair (c, c'), [C, C]
            inner_s, inner_t = ((m.T @ d @ m).diagonal() for m, d in ((a, ss), (b, tt)))
            number = a.sum(0)[:, None] + b.sum(0)[None, :]
            total = inner_s[:, None] + inner_t[None, :] + 2 * a.T @ st @ b
            width = (total / (number * number - number).clamp_min(1)).clamp_min(1e-12)
            row, column = a.argmax(1), b.argmax(1)
        share_s, share_t = a / a.sum(0).clamp_min(1), b / b.sum(0).clamp_min(1)

        def within(distances: Tensor, members: Tensor, share: Tensor, widths: Tensor) -> Tensor:
            """Mean kernel among the samples of class c, at the width of each pair: ``[C, C]``."""
            kernel = gaussian_kernel(distances[:, :, None], widths[:, None, :], kernels, factor)
            kernel = kernel * (members @ members.T)[:, :, None]
            return torch.einsum("ic,ijk,jc->ck", share, kernel, share)

        cross = share_s.T @ gaussian_kernel(st, width[row][:, column], kernels, factor) @ share_t
        e1 = within(ss, a, share_s, width[row])
        e2 = within(tt, b, share_t, width.T[column]).T
        mmd = (e1 + e2 - 2 * cross) * (active[:, None] & active[None, :])
        count = active.sum()
        intra = mmd.diagonal().sum() / count.clamp_min(1)
        inter = (mmd.sum() - mmd.diagonal().sum()) / (count * (count - 1)).clamp_min(1)
        return intra - inter
