"""DW-GCS: minimax risk classification with doubly weighted samples, as an estimator.

Segovia-Martin, Mazuelas and Liu, "Double-Weighting for Covariate Shift Adaptation", ICML 2023; equations by their
number in the order of the paper's algorithm: weights, moments and their tolerance, learning, prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import linprog, minimize
from scipy.sparse import csr_matrix, hstack, identity, vstack
from scipy.special import logsumexp
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from uda.errors import UDAError, check_choice
from uda_transport.weighting import double_weights, median_width

LOSSES = ("log", "0-1")
MAPS = ("linear", "fourier")


def moments(phi: np.ndarray, y: np.ndarray, classes: int, weight: np.ndarray) -> np.ndarray:
    """``tau = mean_i b_i Phi(x_i, y_i)`` as ``[C, F]``, with ``Phi(x, y)`` a block ``phi(x)`` for each class."""
    return (np.eye(classes)[y] * weight[:, None]).T @ phi / len(phi)


def tolerance(phi: np.ndarray, weight: np.ndarray, tau: np.ndarray, margin: float = 1e-6) -> np.ndarray:
    """The smallest (in sum) ``lambda [C, F]`` for which some labelling of the test samples has the moments ``tau``.

    ``min sum lambda`` over ``p [m, C]`` with rows of ``1/m`` and ``lambda >= 0``, subject to ``|sum_i p_ij a_i phi_i -
    tau_j| <= lambda_j - margin``. A linear programme of ``m C + C F`` unknowns, by HiGHS.

    Args:
        phi: of the test samples ``[m, F]``; weight: a ``[m]``; tau: ``[C, F]``.
    """
    (m, f), c = phi.shape, len(tau)
    weighted = csr_matrix((weight[:, None] * phi).T)  # [F, m]
    empty = csr_matrix((f, m))
    total = vstack([hstack([weighted if j == k else empty for j in range(c)]) for k in range(c)])  # p column by column
    upper = vstack([hstack([total, -identity(c * f)]), hstack([-total, -identity(c * f)])], format="csr")
    limit = np.concatenate([tau.ravel(), -tau.ravel()]) - margin
    rows = hstack([identity(m)] * c + [csr_matrix((m, c * f))], format="csr")
    cost = np.concatenate([np.zeros(c * m), np.ones(c * f)])
    found = linprog(cost, upper, limit, rows, np.full(m, 1 / m), bounds=(0, None), method="highs")
    if not found.success:
        raise UDAError(f"DWGCSClassifier: the tolerance of the moments was not found: {found.message}")
    return np.maximum(found.x[c * m :].reshape(c, f), 0.0)


def learn_log(phi: np.ndarray, weight: np.ndarray, tau: np.ndarray, lam: np.ndarray) -> tuple[np.ndarray, float]:
    """Minimise ``-<tau, mu> + mean_i logsumexp_j(a_i phi_i . mu_j) + <lambda, |mu|>``: ``mu [C, F]`` and the minimum.

    ``mu`` is split into two parts that are not negative, which makes the problem smooth within bounds.
    """
    c, f = tau.shape
    scaled = weight[:, None] * phi

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        plus, minus = flat.reshape(2, c, f)
        mu = plus - minus
        scores = scaled @ mu.T
        total = logsumexp(scores, axis=1)
        slope = np.exp(scores - total[:, None]).T @ scaled / len(phi) - tau
        value = -float((tau * mu).sum()) + float(total.mean()) + float((lam * (plus + minus)).sum())
        return value, np.concatenate([(slope + lam).ravel(), (lam - slope).ravel()])

    found = minimize(
        loss, np.zeros(2 * c * f), jac=True, method="L-BFGS-B", bounds=[(0, None)] * (2 * c * f),
        options={"maxiter": 2000, "maxfun": 4000},
    )  # fmt: skip
    plus, minus = found.x.reshape(2, c, f)
    return plus - minus, float(found.fun)


def worst_sets(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``max_S (sum_{j in S} s_j - 1) / |S|`` over non-empty sets of labels, for each row of ``[m, C]``.

    The best set of k labels holds the k largest scores, so C candidates serve and not ``2^C - 1``.

    Returns:
        the maxima ``[m]``, and their sets as ``[m, C]`` of booleans.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    sums = np.take_along_axis(scores, order, 1).cumsum(1)
    means = (sums - 1) / np.arange(1, scores.shape[1] + 1)
    size = means.argmax(1)
    chosen = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(chosen, order, np.arange(scores.shape[1]) <= size[:, None], 1)
    return np.take_along_axis(means, size[:, None], 1)[:, 0], chosen


def learn_zero_one(
    phi: np.ndarray, weight: np.ndarray, tau: np.ndarray, lam: np.ndarray, rounds: int = 100, gap: float = 1e-6
) -> tuple[np.ndarray, float]:
    """Minimise ``-<tau, mu> + mean_i [1 + max_S (sum_{j in S} a_i phi_i . mu_j - 1) / |S|] + <lambda, |mu|>``.

    A linear programme with a row for each sample and set of labels, of which those are added that are violated.

    Returns:
        ``mu [C, F]`` and the minimum, a bound of the error rate.
    """
    (m, f), c = phi.shape, len(tau)
    scaled = weight[:, None] * phi

    def rows(who: np.ndarray, sets: np.ndarray) -> tuple[csr_matrix, np.ndarray]:
        """``sum_{j in S} a phi . mu_j / |S| - v_i <= 1 / |S| - 1``."""
        size = sets.sum(1)
        block = ((sets / size[:, None])[:, :, None] * scaled[who][:, None, :]).reshape(len(who), c * f)
        own = csr_matrix((np.full(len(who), -1.0), (np.arange(len(who)), who)), (len(who), m))
        return hstack([csr_matrix(block), csr_matrix(-block), own], format="csr"), 1 / size - 1

    cost = np.concatenate([(lam - tau).ravel(), (lam + tau).ravel(), np.full(m, 1 / m)])
    bounds = [(0, None)] * (2 * c * f) + [(None, None)] * m
    # sets of one label reach every labelling of the samples: with them the programme is bounded from the start
    matrix, limit = rows(np.tile(np.arange(m), c), np.repeat(np.eye(c, dtype=bool), m, axis=0))
    for _ in range(rounds):
        found = linprog(cost, matrix, limit, bounds=bounds, method="highs")
        if not found.success:
            raise UDAError(f"DWGCSClassifier: the 0-1 programme was not solved: {found.message} Use loss='log'.")
        plus, minus = found.x[: 2 * c * f].reshape(2, c, f)
        worst, sets = worst_sets(scaled @ (plus - minus).T)
        open_ = np.flatnonzero(1 + worst > found.x[2 * c * f :] + gap)
        if not len(open_):
            break
        more, at_most = rows(open_, sets[open_])
        matrix, limit = vstack([matrix, more], format="csr"), np.concatenate([limit, at_most])
    return plus - minus, float(found.fun)


class DWGCSClassifier(ClassifierMixin, BaseEstimator):
    """A classifier for a target whose inputs are distributed otherwise, from labelled source and unlabelled target.

    Source samples are weighed by what is common in the target, and target samples by what is common in the source
    (:func:`~uda_transport.weighting.double_weights`); the classifier minimises the worst risk over all labellings of
    the weighed target whose moments agree with those of the weighed source. With ``leave=0`` it is the minimax
    classifier on kernel mean matching.

    Args:
        leave: how far target samples may be left out, in [0, 1) (``1 - 1/sqrt(D)`` of the paper); None: that of
            ``grid`` with the lowest minimax risk, which needs no target label.
        grid: values that are tried then.
        loss: ``log``, or ``0-1`` (a linear programme; slower).
        feature_map: ``linear``, or ``fourier``: random Fourier features of the Gaussian kernel.
        components: number of random frequencies.
        width: of both kernels, in units of the median distance.
        random_state: of the frequencies.

    Attributes:
        classes_; source_weight_ ``[n]``; target_weight_ ``[m]``; leave_: the chosen one.
        risk_: the minimax risk at the solution: for the 0-1 loss a bound of the error rate.
    """

    def __init__(
        self,
        leave: float | None = None,
        grid: Sequence[float] = (0.0, 0.3, 0.6, 0.9),
        loss: str = "log",
        feature_map: str = "linear",
        components: int = 100,
        width: float = 1.0,
        random_state: int = 0,
    ) -> None:
        self.leave, self.grid, self.loss, self.feature_map = leave, grid, loss, feature_map
        self.components, self.width, self.random_state = components, width, random_state

    def fit(self, X_source: Any, y_source: Any, X_target: Any) -> DWGCSClassifier:
        """Weigh, and learn: ``[n, d]``, labels ``[n]``, ``[m, d]``.

        Raises:
            UDAError: arrays that do not fit together, one class, values that are not finite.
        """
        check_choice("DWGCSClassifier", "loss", self.loss, LOSSES)
        check_choice("DWGCSClassifier", "feature_map", self.feature_map, MAPS)
        x, t, y = np.asarray(X_source, float), np.asarray(X_target, float), np.asarray(y_source)
        if x.ndim != 2 or t.ndim != 2 or x.shape[1] != t.shape[1] or y.shape != x.shape[:1]:
            raise UDAError(
                f"DWGCSClassifier takes [n, d], labels [n] and [m, d], not {x.shape}, {y.shape} and {t.shape}."
            )
        if not (np.isfinite(x).all() and np.isfinite(t).all()):
            raise UDAError("DWGCSClassifier: features have NaN or infinite values.")
        self.classes_, ids = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise UDAError("DWGCSClassifier needs a source of two classes or more.")
        both = np.concatenate([x, t])
        spread = both.std(0)
        self._mean, self._spread = both.mean(0), np.where(spread > 1e-9 * max(spread.max(), 1e-12), spread, 1.0)
        x, t = self._standard(x), self._standard(t)
        self._width = self.width * median_width(np.concatenate([x, t]))
        draw = np.random.default_rng(self.random_state)
        self._frequencies = draw.normal(size=(x.shape[1], self.components)) / self._width
        phi_x, phi_t = self._map(x), self._map(t)
        best = np.inf
        for leave in self.grid if self.leave is None else (self.leave,):
            b, a = double_weights(x, t, leave, self._width)
            tau = moments(phi_x, ids, len(self.classes_), b)
            lam = tolerance(phi_t, a, tau)
            mu, risk = (learn_log if self.loss == "log" else learn_zero_one)(phi_t, a, tau, lam)
            if risk < best:
                best, self.leave_, self.coef_, self.risk_ = risk, leave, mu, risk
                self.source_weight_, self.target_weight_, self.tau_, self.lambda_ = b, a, tau, lam
        return self

    def _standard(self, x: np.ndarray) -> np.ndarray:
        return (x - self._mean) / self._spread / len(self._mean) ** 0.5

    def _map(self, x: np.ndarray) -> np.ndarray:
        """``phi [n, F]`` of standardised rows, its first column 1."""
        one = np.ones((len(x), 1))
        if self.feature_map == "linear":
            return np.concatenate([one, x], 1)
        angle = x @ self._frequencies
        return np.concatenate([one, np.cos(angle), np.sin(angle)], 1)

    def decision_function(self, X: Any) -> np.ndarray:
        """``phi(x) . mu_j`` ``[k, C]``."""
        check_is_fitted(self, "coef_")
        x = np.asarray(X, float)
        if x.ndim != 2 or x.shape[1] != len(self._mean):
            raise UDAError(f"DWGCSClassifier was fitted on {len(self._mean)} features, not on an array {x.shape}.")
        return self._map(self._standard(x)) @ self.coef_.T

    def predict(self, X: Any) -> np.ndarray:
        """Labels ``[k]``: the deterministic rule, the class of the largest score."""
        return self.classes_[self.decision_function(X).argmax(1)]
