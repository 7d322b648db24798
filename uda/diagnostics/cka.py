"""Similarity of representations: CKA, CKA freed of the inputs' similarity, and similarity of covariances.

Pure functions of activations. ``n`` samples, the same ones in the same order in all arguments of a function (but for
:func:`covariance_similarity`); what follows the first dimension is flattened. All is computed in float64.

Kornblith et al., *Similarity of Neural Network Representations Revisited*, ICML 2019 (CKA). Song et al., *Feature
Selection via Dependence Maximization*, JMLR 2012 (the unbiased estimator). Cui et al., *Deconfounded Representation
Similarity for Comparison of Neural Networks*, NeurIPS 2022 (dCKA).
"""

from __future__ import annotations

import torch
from torch import Tensor

from uda.errors import UDAError
from uda.nn.precision import no_autocast


def gram(activations: Tensor) -> Tensor:
    """Linear kernel ``[n, n]`` of activations ``[n, ...]``, centred by column and of trace 1.

    ``K = X X^T`` with ``X`` less its column means and divided by its Frobenius norm, as dCKA prepares all its inputs;
    CKA does not depend on either. Activations that are the same for all samples give a kernel of zeros.

    Raises:
        UDAError: fewer than two samples, or values that are not finite.
    """
    with no_autocast(activations):
        x = activations.detach().flatten(1) if activations.ndim > 1 else activations.detach()[:, None]
        x = x.double() if x.device.type != "mps" else x.cpu().double()
        if len(x) < 2:
            raise UDAError(f"Similarity of representations needs at least 2 samples, got {len(x)}.")
        if not bool(x.isfinite().all()):
            raise UDAError("Similarity of representations: the activations hold NaN or infinite values.")
        x = x - x.mean(0)
        norm = x.norm()
        return x @ x.T / norm.square() if float(norm) > 0 else x.new_zeros(len(x), len(x))


def centred(kernel: Tensor) -> Tensor:
    """``H K H`` with ``H = I - 1 1^T / n``."""
    return kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()


def hsic(k: Tensor, m: Tensor, unbiased: bool = False) -> Tensor:
    """Hilbert-Schmidt independence criterion of two kernels ``[n, n]``, up to a factor that CKA cancels.

    Biased: ``<H K H, H M H>``. Unbiased (Song et al. 2012): with the diagonals of K and M set to zero,
    ``tr(K M) + 1'K1 1'M1 / ((n-1)(n-2)) - 2 / (n-2) 1'K M 1``. The biased one tends to 1 for CKA where there are more
    features than samples, whatever they are.

    Raises:
        UDAError: kernels of different sizes; unbiased with fewer than 4 samples.
    """
    if k.shape != m.shape or k.ndim != 2 or k.shape[0] != k.shape[1]:
        raise UDAError(
            f"Kernels are square and of one size, got {list(k.shape)} and {list(m.shape)}: compare representations of "
            "the same samples."
        )
    if not unbiased:
        return (centred(k) * centred(m)).sum()
    n = len(k)
    if n < 4:
        raise UDAError(f"The unbiased estimate needs at least 4 samples, got {n}.")
    off = 1 - torch.eye(n, dtype=k.dtype, device=k.device)
    k, m = k * off, m * off
    return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k.sum(0) @ m.sum(1))


def kernel_similarity(k: Tensor, m: Tensor, unbiased: bool = False) -> Tensor:
    """``HSIC(K, M) / sqrt(HSIC(K, K) HSIC(M, M))``, a scalar; NaN where a kernel is constant.

    In [-1, 1]; in [0, 1] for biased estimates of kernels without negative eigenvalues.
    """
    own = hsic(k, k, unbiased) * hsic(m, m, unbiased)
    return hsic(k, m, unbiased) / own.sqrt() if float(own) > 0 else own.new_tensor(torch.nan)


def _regress(kernel: Tensor, confounder: Tensor) -> tuple[Tensor, Tensor]:
    """Intercept and slope of the entries of ``kernel`` on those of ``confounder``, by least squares."""
    if kernel.shape != confounder.shape:
        raise UDAError(f"The confounder's kernel is {list(confounder.shape)}, the other one {list(kernel.shape)}.")
    d = confounder - confounder.mean()
    spread = d.square().sum()
    slope = (d * kernel).sum() / spread if float(spread) > 0 else spread  # a constant confounder explains nothing
    return kernel.mean() - slope * confounder.mean(), slope


def deconfound(kernel: Tensor, confounder: Tensor, positive: bool = False) -> Tensor:
    """Residual ``K - b0 - b1 K0`` of the regression of K's entries on those of the confounder's kernel ``K0``.

    Cui et al. 2022: what two samples' representations share only because the inputs are alike is taken out. The two
    coefficients are those of ordinary least squares over all n^2 entries. Zero where the confounder explains it all.

    Args:
        kernel: ``[n, n]``; confounder: ``[n, n]``, of the inputs or of an embedding of them.
        positive: set negative eigenvalues of the residual to zero, so that it is a kernel again.
    """
    intercept, slope = _regress(kernel, confounder)
    rest = kernel - intercept - slope * confounder
    if float(rest.norm()) <= 1e-6 * float(kernel.norm()):  # rounding is no representation
        return torch.zeros_like(rest)
    if positive:
        values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
        rest = (vectors * values.clamp_min(0)) @ vectors.T
    return rest


def explained_by(activations: Tensor, inputs: Tensor) -> Tensor:
    """Share of the variance of the representation's kernel that the inputs' kernel explains (R^2), in [0, 1].

    Args:
        activations: ``[n, ...]``; inputs: ``[n, ...]``.
    """
    kernel, confounder = gram(activations), gram(inputs)
    rest = deconfound(kernel, confounder)
    spread = (kernel - kernel.mean()).square().sum()
    return 1 - rest.square().sum() / spread if float(spread) > 0 else spread.new_tensor(torch.nan)


def cka(x: Tensor, y: Tensor, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two representations of the same samples, a scalar (Kornblith et al. 2019).

    1 for representations that are equal up to a turn and a factor.

    Args:
        x: activations ``[n, ...]``; y: ``[n, ...]``, of any other width.
        unbiased: see :func:`hsic`; to be preferred where n is not much larger than the number of features.
    """
    return kernel_similarity(gram(x), gram(y), unbiased)


def dcka(x: Tensor, y: Tensor, inputs: Tensor, unbiased: bool = False, positive: bool = False) -> Tensor:
    """CKA of what is left of both representations after the inputs' similarity is taken out (Cui et al. 2022).

    Args:
        x: activations ``[n, ...]``; y: ``[n, ...]``.
        inputs: the confounder ``[n, ...]``: the inputs themselves, or an embedding of them.
        unbiased: see :func:`hsic`; positive: see :func:`deconfound`.
    """
    confounder = gram(inputs)
    one, two = (deconfound(gram(a), confounder, positive) for a in (x, y))
    return kernel_similarity(one, two, unbiased)


def covariance_similarity(x: Tensor, y: Tensor) -> Tensor:
    """``<C_x, C_y> / (|C_x| |C_y|)`` of two domains' feature covariances, in [0, 1]; no paper's measure.

    CKA compares two representations of the same samples; this compares two sets of samples in one representation, such
    as source and target in one layer: whether the same directions vary, and as strongly in proportion.

    Args:
        x: activations ``[n, F]``; y: ``[m, F]``, of the same F features.

    Raises:
        UDAError: different numbers of features.
    """
    if x.flatten(1).shape[1] != y.flatten(1).shape[1]:
        raise UDAError(f"Two domains in one layer have the same features, got {list(x.shape)} and {list(y.shape)}.")
    with no_autocast(x):
        a, b = (v.detach().flatten(1).double() for v in (x, y))
        a, b = a - a.mean(0), b - b.mean(0)
        norms = (a @ a.T).norm() * (b @ b.T).norm()  # |X'X| = |XX'|, and n is small where F is large
        return (a @ b.T).square().sum() / norms if float(norms) > 0 else norms.new_tensor(torch.nan)
