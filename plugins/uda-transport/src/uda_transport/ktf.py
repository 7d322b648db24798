"""KTF: transfer to few labelled target samples from any labelled source, even one of noise, as an estimator.

Yao, Zhang, Zhang, Jin and Yang, "Noise May Contain Transferable Knowledge: Understanding Semi-supervised Heterogeneous
Domain Adaptation from an Empirical Perspective", 2025 (their knowledge transfer framework).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.nn import functional

from uda.errors import UDAError


def noise_domain(
    classes: int, dim: int = 256, each: int = 100, separation: float = 1.0, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A source of noise: for each class a mean ``separation * N(0, I)`` and samples ``N(mean, I)``.

    Returns:
        ``x [classes * each, dim]`` and class ids.
    """
    draw = np.random.default_rng(seed)
    centres = separation * draw.normal(size=(classes, dim))
    y = np.repeat(np.arange(classes), each)
    return centres[y] + draw.normal(size=(len(y), dim)), y


def class_means(z: Tensor, share: Tensor) -> Tensor:
    """Weighted mean of ``z [n, F]`` for each class by ``share [n, C]``: ``[C, F]``; 0 where a class has no mass."""
    return share.T @ z / share.sum(0).clamp_min(1e-12)[:, None]


def mean_discrepancy(source: Tensor, y: Tensor, target: Tensor, probs: Tensor) -> Tensor:
    """``(|m_s - m_t|^2 + sum_c |m_s^c - m_t^c|^2) / (C + 1)``, linear MMD of domains and classes.

    Args:
        source: ``[n, F]``; y: class ids ``[n]``; target: ``[m, F]``; probs: ``[m, C]``, one-hot where a label is known.
            Gradients pass through it, as in the authors' code.
    """
    c = probs.shape[1]
    gaps = class_means(source, functional.one_hot(y, c).to(source.dtype)) - class_means(target, probs)
    return ((source.mean(0) - target.mean(0)).square().sum() + gaps.square().sum()) / (c + 1)


class KTFClassifier(ClassifierMixin, BaseEstimator):
    """Semi-supervised, across feature spaces: the source may be anything that has as many classes.

    ``L = CE(labelled target) + beta CE(source) + mu MMD + tau |W|^2 / 2``, full batch, with a projector of the target
    (linear, leaky ReLU, rows of length 1) into the space of the source and one classifier for both
    (:func:`mean_discrepancy` is the MMD). The paper's finding is that separable classes of the source matter, and
    neither its origin nor its features do: :func:`noise_domain` makes such a source.

    Source features are standardised by column, and pass a fixed random projection where they are not ``dim`` wide (the
    authors feed features that were projected before, and do not say how).

    Args:
        beta, mu, tau: weights; the authors' ``mu`` is 0.1 for texts and 1.0 for photographs.
        dim: of the common space.
        lr: of Adam; steps: full-batch iterations.
        random_state: of initial weights and projection.

    Attributes:
        classes_; labels_: of the target samples of ``fit``.
    """

    def __init__(
        self,
        beta: float = 0.1,
        mu: float = 0.1,
        tau: float = 0.05,
        dim: int = 256,
        lr: float = 1e-3,
        steps: int = 600,
        random_state: int = 0,
    ) -> None:
        self.beta, self.mu, self.tau, self.dim = beta, mu, tau, dim
        self.lr, self.steps, self.random_state = lr, steps, random_state

    def fit(self, X_source: Any, y_source: Any, X_target: Any, y_target: Any) -> KTFClassifier:
        """Train on source ``[n, d]``, labels ``[n]``, target ``[m, e]`` and its labels ``[m]``, -1 where unknown.

        Raises:
            UDAError: arrays that do not fit together, no labelled target sample, labels that the source lacks.
        """
        x, t = np.asarray(X_source, np.float32), np.asarray(X_target, np.float32)
        y_source, y_target = np.asarray(y_source), np.asarray(y_target)
        if x.ndim != 2 or t.ndim != 2 or y_source.shape != x.shape[:1] or y_target.shape != t.shape[:1]:
            raise UDAError(
                f"KTFClassifier takes [n, d], labels [n], [m, e] and labels [m] with -1 for unknown, not {x.shape}, "
                f"{y_source.shape}, {t.shape} and {y_target.shape}."
            )
        if not (np.isfinite(x).all() and np.isfinite(t).all()):
            raise UDAError("KTFClassifier: features have NaN or infinite values.")
        self.classes_, ids = np.unique(y_source, return_inverse=True)
        known = np.array([v is not None and v != -1 for v in y_target.tolist()])
        place = {c: i for i, c in enumerate(self.classes_.tolist())}
        given = [v for v, k in zip(y_target.tolist(), known, strict=True) if k]
        if stray := sorted({str(v) for v in given if v not in place}):
            raise UDAError(f"y_target has the label {stray[0]!r}, which the source lacks. -1 stands for unlabelled.")
        if not given:
            raise UDAError("KTFClassifier needs labelled target samples, some of each class if possible.")
        generator = torch.Generator().manual_seed(self.random_state)
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
        z_s, ids, target = torch.from_numpy(x), torch.from_numpy(ids), torch.from_numpy(t)
        if z_s.shape[1] != self.dim:
            z_s = z_s @ torch.randn(z_s.shape[1], self.dim, generator=generator) / self.dim**0.5
        z_s = functional.normalize(z_s)
        self._projector, self._head = nn.Linear(t.shape[1], self.dim), nn.Linear(self.dim, len(self.classes_))
        for layer in (self._projector, self._head):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02, generator=generator)
            nn.init.zeros_(layer.bias)
        known, labels = torch.from_numpy(known), torch.tensor([place[v] for v in given])
        weights = (self._projector.weight, self._head.weight)
        optimiser = torch.optim.Adam([*self._projector.parameters(), *self._head.parameters()], self.lr)
        for _ in range(self.steps):
            z_t = self._project(target)
            logits = self._head(z_t)
            probs = logits.softmax(1).masked_scatter(
                known[:, None].expand(-1, logits.shape[1]), functional.one_hot(labels, logits.shape[1]).float()
            )
            loss = (
                functional.cross_entropy(logits[known], labels)
                + self.beta * functional.cross_entropy(self._head(z_s), ids)
                + self.mu * mean_discrepancy(z_s, ids, z_t, probs)
                + self.tau / 2 * sum(w.square().sum() for w in weights)
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.loss_ = float(loss.detach())
        self.labels_ = self.predict(t)
        return self

    def _project(self, x: Tensor) -> Tensor:
        return functional.normalize(functional.leaky_relu(self._projector(x), 0.2))

    @torch.no_grad()
    def predict_proba(self, X: Any) -> np.ndarray:
        """Class distributions ``[k, C]`` of target samples ``[k, e]``."""
        check_is_fitted(self, "classes_")
        x = np.asarray(X, np.float32)
        if x.ndim != 2 or x.shape[1] != self._projector.in_features:
            raise UDAError(f"predict takes target features [samples, {self._projector.in_features}], not {x.shape}.")
        return self._head(self._project(torch.from_numpy(x))).softmax(1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """Labels ``[k]`` of target samples ``[k, e]``."""
        return self.classes_[self.predict_proba(X).argmax(1)]
