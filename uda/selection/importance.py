"""Source validation weighted to the target: IWV and DEV."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from uda.errors import UDAError
from uda.selection.pool import PoolScore, ScorePool

_LARGEST = 30.0  # largest absolute log density ratio: exp(30) is 1e13


def density_ratio(source: Tensor, target: Tensor, query: Tensor, regularisation: float = 1.0) -> Tensor:
    """``p_target(x) / p_source(x)`` at ``query`` ``[Q, F]`` by a logistic domain classifier; float64 ``[Q]``.

    ``w(x) = N_s / N_t * P(target | x) / P(source | x)`` (You et al. 2019; Bickel et al. 2007). You et
    al. train a multi-layer perceptron and choose its decay; a logistic regression on standardised features is
    convex, hence repeatable, and much cheaper.

    Args:
        source: features ``[N_s, F]``; ``target``: ``[N_t, F]``.
        regularisation: inverse weight of the L2 penalty, scikit-learn's ``C``.
    """
    from sklearn.linear_model import LogisticRegression

    if not len(source) or not len(target):
        raise UDAError("A density ratio needs features of both domains: this run has no source validation data.")
    s, t, q = (x.detach().cpu().double().numpy() for x in (source, target, query))
    x = np.concatenate((s, t))
    mean, scale = x.mean(0), x.std(0)
    scale[scale < 1e-12] = 1.0
    y = np.concatenate((np.zeros(len(s)), np.ones(len(t))))
    # standardised features make a few dozen iterations enough; an unfinished fit is still a valid classifier
    classifier = LogisticRegression(C=regularisation, max_iter=200, tol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier.fit((x - mean) / scale, y)
    log_odds = classifier.decision_function((q - mean) / scale)
    return torch.from_numpy(len(s) / len(t) * np.exp(np.clip(log_odds, -_LARGEST, _LARGEST)))


def cross_fitted_weights(source: Tensor, target: Tensor, folds: int = 2, seed: int = 0) -> Tensor:
    """Density ratio at each source row ``[N_s]``, from a classifier that has not seen this row.

    You et al. fit on the training split of the source and weigh its validation split. Here one pass serves
    all scores, and holds validation rows only: each part of them is weighed by a classifier of the other
    parts.
    """
    if len(source) < 2 * folds:
        raise UDAError(f"IWV and DEV need at least {2 * folds} source validation rows, got {len(source)}.")
    part = torch.arange(len(source)) % folds
    part = part[torch.randperm(len(source), generator=torch.Generator().manual_seed(seed))]
    weights = torch.zeros(len(source), dtype=torch.float64)
    for k in range(folds):
        weights[part == k] = density_ratio(source[part != k], target, source[part == k])
    return weights


def iwv(weights: Tensor, errors: Tensor) -> Tensor:
    """``-mean_i w_i e_i`` over source validation rows ``[M]``; in ``(-inf, 0]`` (Sugiyama et al. 2007).

    ``errors`` are 0 or 1 (or any loss). skada's scorer takes kernel densities of the raw inputs and scales
    the weights to sum to one, which is another score. Fails where domains overlap little: a few huge weights
    decide.
    """
    return -(weights.double() * errors.double()).mean()


def dev(weights: Tensor, errors: Tensor) -> Tensor:
    """IWV with a control variate; ``weights`` and ``errors`` ``[M]``, M >= 2; mostly in ``[-1, 0]``.

    ``-(mean(w e) + eta mean(w) - eta)`` with ``eta = -Cov(w e, w) / Var(w)`` (You et al. 2019, and the
    authors' ``dev.py``); 0 where all weights are equal. The true mean of ``w`` is 1, which lowers the
    variance. skada 0.6.0 with its default loss multiplies weights ``[M, 1]`` by errors ``[M]``, an outer
    product, and so gives another number. Fails where domains overlap little, and can be positive then; it
    knows nothing of how target classes moved.
    """
    if weights.ndim != 1 or weights.shape != errors.shape:  # [n, 1] and [n] would make an outer product
        shapes = f"{tuple(weights.shape)} and {tuple(errors.shape)}"
        raise UDAError(f"DEV needs weights and errors of one shape [M], got {shapes}.")
    w, e = weights.double(), errors.double()
    if len(w) < 2:
        raise UDAError("DEV needs at least two source validation rows.")
    loss = w * e
    variance = w.var()
    covariance = ((loss - loss.mean()) * (w - w.mean())).sum() / (len(w) - 1)
    eta = -covariance / variance if variance > 0 else torch.zeros_like(variance)
    return -(loss.mean() + eta * w.mean() - eta)


def _errors(pool: ScorePool) -> Tensor:
    return (pool.source_logits.argmax(1) != pool.source_y).double()


class IWV(PoolScore):
    """Metric form of :func:`iwv`, with 0-1 errors and cross-fitted weights."""

    needs_source = True

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool."""
        return iwv(pool.weights, _errors(pool))


class DEV(PoolScore):
    """Metric form of :func:`dev`, with 0-1 errors and cross-fitted weights."""

    needs_source = True

    @staticmethod
    def score(pool: ScorePool) -> Tensor:
        """From a pool."""
        return dev(pool.weights, _errors(pool))
