"""How far a classifier's confidence can be trusted, and what it says of the accuracy on an unlabelled target."""

from __future__ import annotations

from typing import Any

import numpy as np

from uda.errors import UDAError


def softmax(logits: Any) -> np.ndarray:
    """Probabilities of logits ``[N, C]``; float64."""
    logits = np.asarray(logits, dtype=np.float64)
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def ece(probs: Any, y: Any, bins: int = 15) -> float:
    """Expected calibration error: ``sum_b |B_b| / N |accuracy(B_b) - confidence(B_b)|`` (Guo et al. 2017).

    Args:
        probs: class probabilities ``[N, C]``; labels ``y`` ``[N]``.
        bins: of equal width over (0, 1].
    """
    probs, y = _labelled(probs, y)
    confidence, correct = probs.max(1), probs.argmax(1) == y
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(y))


def temperature(logits: Any, y: Any) -> float:
    """The ``T`` in ``softmax(logits / T)`` that makes labels ``y`` ``[N]`` most likely (Guo et al. 2017)."""
    return _scale(*_labelled(logits, y), biased=False)[0]


def bcts(logits: Any, y: Any) -> tuple[float, np.ndarray]:
    """Bias-corrected temperature scaling: ``T`` and ``b`` ``[C]`` in ``softmax(logits / T + b)``.

    Alexandari, Kundaje and Shrikumar 2020: a temperature alone leaves a systematic error by class, which
    :func:`uda.shift.priors.mlls_prior` would take for a shift. Fit on held-out source rows.
    """
    return _scale(*_labelled(logits, y), biased=True)


def _scale(logits: np.ndarray, y: np.ndarray, biased: bool) -> tuple[float, np.ndarray]:
    from scipy.optimize import minimize

    n, c = logits.shape
    truth = np.eye(c)[y]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        factor, bias = np.exp(parameters[0]), parameters[1:] if biased else 0.0
        z = logits * factor + bias
        top = z.max(1, keepdims=True)
        log_sum = (top + np.log(np.exp(z - top).sum(1, keepdims=True)))[:, 0]
        wrong = (np.exp(z - log_sum[:, None]) - truth) / n
        slope = np.concatenate(([(wrong * logits).sum() * factor], wrong.sum(0) if biased else []))
        return float((log_sum - z[np.arange(n), y]).mean()), slope

    # bounds: a classifier without a single held-out error would take T to 0
    bounds = [(-np.log(50.0), np.log(20.0))] + [(-8.0, 8.0)] * (c if biased else 0)
    found = minimize(loss, np.zeros(len(bounds)), jac=True, method="L-BFGS-B", bounds=bounds).x
    bias = found[1:] - found[1:].mean() if biased else np.zeros(c)
    return float(np.exp(-found[0])), bias


def atc(source_probs: Any, source_y: Any, target_probs: Any) -> float:
    """Average thresholded confidence: the target's share above the threshold that gives the source's accuracy.

    Garg et al. 2022 (ATC with maximum confidence): the threshold is set on held-out source rows, such that as many
    are below it as are wrong. Mostly too high where the shift is large.
    """
    probs, y = _labelled(source_probs, source_y)
    confidence, errors = np.sort(probs.max(1)), int((probs.argmax(1) != y).sum())
    threshold = confidence[errors] if errors < len(confidence) else np.inf
    return float((np.asarray(target_probs, dtype=np.float64).max(1) >= threshold).mean())


def doc(source_probs: Any, source_y: Any, target_probs: Any) -> float:
    """Difference of confidences: source accuracy less the fall of the mean confidence (Guillory et al. 2021)."""
    probs, y = _labelled(source_probs, source_y)
    fall = probs.max(1).mean() - np.asarray(target_probs, dtype=np.float64).max(1).mean()
    return float(np.clip((probs.argmax(1) == y).mean() - fall, 0.0, 1.0))


def _labelled(rows: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    rows, y = np.asarray(rows, dtype=np.float64), np.asarray(y).astype(np.int64)
    if rows.ndim != 2 or not len(rows) or y.shape != rows.shape[:1] or y.min() < 0 or y.max() >= rows.shape[1]:
        raise UDAError(f"rows [N, C] and labels [N] in [0, C) are needed, got {list(rows.shape)} and {list(y.shape)}.")
    return rows, y
