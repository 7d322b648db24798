"""COOT and UCOOT as estimators in the manner of scikit-learn: two arrays with different features, no training loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from uda.errors import UDAError
from uda_transport.across import cross
from uda_transport.scaling import map_features


def soft_regression(
    x: np.ndarray, probs: np.ndarray, weight: np.ndarray, l2: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial regression on class distributions: ``W [F, C]`` and ``b [C]``.

    ``min sum_i w_i CE(softmax(x_i W + b), p_i) / sum_i w_i + l2 |W|^2 / 2``.

    Args:
        x: ``[n, F]``; probs: ``[n, C]``; weight: ``[n]``, not negative.
    """
    f, c = x.shape[1], probs.shape[1]
    share = weight / weight.sum()

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: f * c].reshape(f, c), flat[f * c :]
        logits = x @ w + b
        logits -= logits.max(1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        slope = share[:, None] * (np.exp(logp) - probs)
        gradient = np.concatenate([(x.T @ slope + l2 * w).ravel(), slope.sum(0)])
        return -float((share[:, None] * probs * logp).sum()) + l2 / 2 * float((w**2).sum()), gradient

    flat = minimize(loss, np.zeros(f * c + c), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return flat[: f * c].reshape(f, c), flat[f * c :]


class COOTClassifier(ClassifierMixin, BaseEstimator):
    """Classify a target by labelled samples of another feature space (Redko et al., NeurIPS 2020).

    ``fit`` matches samples with samples and features with features, labels the target by the mass that it receives,
    and trains a linear classifier on these soft labels, so that ``predict`` serves samples that no plan has seen.
    Without any labelled target sample the matching is a guess that symmetries of the data can turn; a few a class
    fix it.

    Args:
        epsilon: entropy of the samples' plan, in units of what the product plan costs; None: tried and chosen without
            target labels. 0 is exact transport.
        epsilon_features: entropy of the features' plan; 0 is exact.
        label_cost: of matching a labelled target sample with a source sample of another class, in the same units.
        normalise: ``zscore`` (columns), ``centre`` (whole matrices) or ``none``.
        starts: of the descent, which ends in a local minimum; the lowest objective wins.
        max_samples: most samples a domain in a plan; None is as many as fit into memory. The others are labelled by
            their nearest neighbours.
        min_mass: target samples that receive less than this share of an equal part get no label.
        l2: penalty of the classifier.
        max_iter: rounds of the descent.
        random_state: of subsets and random starts.
        device: ``cpu``, or a CUDA device where entropic plans are solved in float32.

    Attributes:
        sample_plan_: ``[n, m]``; feature_plan_: ``[d, e]``. With ``max_samples`` rows are those of ``source_rows_``
            and columns those of ``target_rows_``.
        classes_: labels of the source, sorted.
        labels_: of the target samples of ``fit``, -1 (or None for labels that are no numbers) where one abstains.
        target_probs_: their class distributions ``[m, C]``; target_mass_: what each received, 1 is an equal part.
        cost_, n_iter_, converged_, epsilon_, agreement_: of the plans, see :class:`~uda_transport.across.Crossed`.
    """

    _method: ClassVar[str] = "coot"

    def __init__(
        self,
        epsilon: float | None = 0.1,
        epsilon_features: float = 0.0,
        label_cost: float = 2.0,
        normalise: str = "zscore",
        starts: int = 1,
        max_samples: int | None = None,
        min_mass: float = 0.1,
        l2: float = 1e-2,
        max_iter: int = 50,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        self.epsilon, self.epsilon_features, self.label_cost = epsilon, epsilon_features, label_cost
        self.normalise, self.starts, self.max_samples = normalise, starts, max_samples
        self.min_mass, self.l2, self.max_iter = min_mass, l2, max_iter
        self.random_state, self.device = random_state, device

    def _options(self) -> dict[str, Any]:
        return {"epsilon_features": self.epsilon_features}

    def fit(self, X_source: Any, y_source: Any, X_target: Any, y_target: Any = None) -> COOTClassifier:
        """Match, label and train.

        Args:
            X_source: ``[n, d]``; y_source: labels ``[n]``; X_target: ``[m, e]``.
            y_target: labels of the few known target samples, -1 for the others ``[m]``; None: none is known.

        Raises:
            UDAError: bad input, or plans that break down.
        """
        y_source = np.asarray(y_source)
        if y_source.ndim != 1:
            raise UDAError(f"y_source must hold one label a sample, not the shape {y_source.shape}.")
        self.classes_, ids = np.unique(y_source, return_inverse=True)
        known = None if y_target is None else self._known(np.asarray(y_target))
        found = cross(
            X_source, X_target, ids, len(self.classes_), known, self._method, self.epsilon, label_cost=self.label_cost,
            normalise=self.normalise, number_of_starts=self.starts, max_samples=self.max_samples,
            max_iter=self.max_iter, seed=self.random_state, device=self.device, **self._options(),
        )  # fmt: skip
        plans = found.plans
        self.crossed_, self.sample_plan_, self.feature_plan_ = found, plans.samples, plans.features
        self.source_rows_, self.target_rows_ = found.source_rows, found.target_rows
        self.target_probs_, self.target_mass_ = found.probs, found.mass
        self.cost_, self.n_iter_, self.converged_ = plans.cost, plans.steps, plans.converged
        self.epsilon_, self.agreement_ = found.epsilon, found.agreement
        kept = found.mass >= self.min_mass
        if known is not None:
            kept |= known >= 0
        if not kept.any():
            raise UDAError(
                "No target sample received enough mass for a label: lower min_mass, or raise reg_marginals of UCOOT."
            )
        none = -1 if self.classes_.dtype.kind in "iuf" else None
        self.labels_ = np.where(kept, self.classes_[found.probs.argmax(1)], none)
        x = self._standard(np.asarray(X_target, dtype=np.float64), fit=True)
        self.coef_, self.intercept_ = soft_regression(
            x[kept], found.probs[kept], np.clip(found.mass[kept], 0.1, 1.0), self.l2
        )
        return self

    def _known(self, y: np.ndarray) -> np.ndarray:
        unknown = np.array([v is None or v == -1 for v in y.tolist()])
        place = {c: i for i, c in enumerate(self.classes_.tolist())}
        given = [v for v, no in zip(y.tolist(), unknown, strict=True) if not no]
        if stray := sorted({str(v) for v in given if v not in place}):
            raise UDAError(f"y_target has the label {stray[0]!r}, which the source lacks. -1 stands for unlabelled.")
        return np.array([-1 if no else place[v] for v, no in zip(y.tolist(), unknown, strict=True)], dtype=np.int64)

    def _standard(self, x: np.ndarray, fit: bool = False) -> np.ndarray:
        """The classifier's own scale: columns standardised, rows of mean square 1."""
        if fit:
            spread = x.std(0)
            self._mean, self._spread = x.mean(0), np.where(spread > 1e-9 * spread.max(), spread, 1.0)
        elif x.ndim != 2 or x.shape[1] != len(self._mean):
            raise UDAError(f"predict takes target features [samples, {len(self._mean)}], not the shape {x.shape}.")
        return (x - self._mean) / self._spread / len(self._mean) ** 0.5

    def predict_proba(self, X: Any) -> np.ndarray:
        """Class distributions ``[k, C]`` of target samples ``[k, e]``, those of ``fit`` or new ones."""
        check_is_fitted(self, "coef_")
        logits = self._standard(np.asarray(X, dtype=np.float64)) @ self.coef_ + self.intercept_
        odds = np.exp(logits - logits.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:
        """Labels ``[k]`` of target samples ``[k, e]``."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def transform(self, X: Any) -> np.ndarray:
        """Source samples ``[k, d]`` in the target's features ``[k, e]``, through the feature plan."""
        check_is_fitted(self, "feature_plan_")
        x = np.asarray(X, dtype=np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.crossed_.source_scale.shift):
            raise UDAError(
                f"transform takes source features [samples, {len(self.crossed_.source_scale.shift)}], not {x.shape}."
            )
        return map_features(x, self.feature_plan_, self.crossed_.source_scale, self.crossed_.target_scale)


class UCOOTClassifier(COOTClassifier):
    """The same by unbalanced transport (Tran et al., AAAI 2023): outliers and noisy features may be left out.

    Args:
        epsilon: entropy of the samples' plan, positive; None: tried and chosen without target labels.
        epsilon_features: entropy of the features' plan, positive.
        reg_marginals: what holds the marginals, of the source side and the target side, in units of what the product
            plan costs. Large values approach COOT, small ones leave out more.
        label_cost, normalise, starts, max_samples, min_mass, l2, max_iter, random_state, device: as for COOT.
    """

    _method: ClassVar[str] = "ucoot"

    def __init__(
        self,
        epsilon: float | None = 0.1,
        epsilon_features: float = 0.005,
        reg_marginals: float | Sequence[float] = 1.0,
        label_cost: float = 2.0,
        normalise: str = "zscore",
        starts: int = 1,
        max_samples: int | None = None,
        min_mass: float = 0.1,
        l2: float = 1e-2,
        max_iter: int = 50,
        random_state: int = 0,
        device: str = "cpu",
    ) -> None:
        super().__init__(
            epsilon, epsilon_features, label_cost, normalise, starts, max_samples, min_mass, l2, max_iter, random_state,
            device,
        )  # fmt: skip
        self.reg_marginals = reg_marginals

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "reg_marginals": self.reg_marginals}
