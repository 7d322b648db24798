"""Rejection by a threshold: lets any method of the closed set stand in an open or universal setting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uda.errors import UDAError, nearest
from uda.nn.bank import gather_rows
from uda.nn.precision import full, no_autocast
from uda.passes import target_now
from uda.plugin import SETTINGS, DataNeeds, Plugin, Prediction, hookimpl

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.step import DomainBatch

MEASURES = ("entropy", "confidence", "energy")


def normalised_entropy(logits: Tensor) -> Tensor:
    """``H(p) / log C`` of the softmax of logits ``[B, C]``: ``[B]`` in [0, 1]."""
    with no_autocast(logits):
        log_p = full(logits).log_softmax(1)
        return -(log_p.exp() * log_p).sum(1) / math.log(max(logits.shape[1], 2))


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``-T log sum_c exp(z_c / T)`` ``[B]`` of logits ``[B, C]`` (Liu et al., NeurIPS 2020); larger is stranger."""
    with no_autocast(logits):
        return -temperature * (full(logits) / temperature).logsumexp(1)


def otsu(scores: Tensor) -> float:
    """Where numbers ``[N]`` fall into two groups: the cut with the largest variance between groups, over all cuts.

    ``argmax_t n_0 n_1 (m_0 - m_1)^2`` of the counts and means on its two sides (Otsu, IEEE Trans. SMC 1979); the cut
    is in the middle between two neighbours. Of numbers that are all alike, that number: none lies above.
    """
    x = scores.double().flatten().sort().values
    if x[0] == x[-1]:
        return x[0].item()
    below = torch.arange(1, len(x), device=x.device, dtype=x.dtype)
    above, lower = len(x) - below, x.cumsum(0)[:-1]
    between = below * above * (lower / below - (x.sum() - lower) / above).square()
    cut = between.masked_fill(x[1:] == x[:-1], -1.0).argmax()
    return ((x[cut] + x[cut + 1]) / 2).item()


def known_limit(model: UDA, limit: Tensor, name: str) -> float:
    """The limit that an evaluation has set; infinite in a sanity check, which comes before there is one.

    Raises:
        UDAError: it is NaN: there was no evaluation yet.
    """
    value = limit.item()
    if not math.isnan(value):
        return value
    if model._trainer is None or not model._trainer.sanity_checking:
        raise UDAError(f"{name} is not known yet: validate or fit first.")
    return math.inf


class Reject(Plugin):
    """Marks a target sample as unknown where it looks strange; trains nothing, and goes with every method.

    What is compared with the threshold is ``unknown_score`` of the prediction afterwards. No target label has a part in
    the threshold, and the target's samples only with ``split``. Sources are never rejected.

    Args:
        measure: ``entropy``: that of the softmax over ``log C``, in [0, 1]; ``confidence``: one minus the score of the
            prediction, whoever made it (by default the largest softmax); ``energy``: ``-T log sum exp(z / T)``.
        threshold: a sample is unknown above it. None: from ``quantile``, or, where that is None too, 0.5 of the entropy
            (``0.5 log C``, the centre of DANCE's margin).
        quantile: the threshold is this quantile of the measure over the held-out source samples
            (``data.source_val_fraction``), taken anew in each evaluation: about this share of the source would stay
            known. ``uda predict`` takes that of the last evaluation before the checkpoint.
        split: the threshold is where the target's own measures fall into two groups (:func:`otsu`), taken anew in each
            evaluation: for a target that is known to have unknown classes, since any numbers have such a cut.
        temperature: T of the energy.
    """

    settings = tuple(s for s in SETTINGS if s != "multi-label")
    limit: Tensor

    def __init__(
        self,
        measure: str = "entropy",
        threshold: float | None = None,
        quantile: float | None = None,
        split: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise UDAError(f"Reject: unknown measure {measure!r}. {nearest(str(measure), MEASURES)}")
        if (threshold is not None) + (quantile is not None) + split > 1:
            raise UDAError("Reject takes a threshold, a quantile or split, not both.")
        if split and measure == "confidence":
            raise UDAError("Reject: split takes the measure entropy or energy.")
        if quantile is not None and not 0 < quantile < 1:
            raise UDAError(f"Reject: quantile must be between 0 and 1, got {quantile}.")
        if temperature <= 0:
            raise UDAError(f"Reject: temperature must be positive, got {temperature}.")
        if threshold is None and quantile is None and not split:
            if measure != "entropy":
                raise UDAError(f"Reject: {measure} has no threshold of its own: give threshold or quantile.")
            threshold = 0.5
        self.measure, self.threshold, self.quantile, self.temperature = measure, threshold, quantile, temperature
        self.split = split
        self.register_buffer("limit", torch.tensor(math.nan if threshold is None else float(threshold)))
        self._seen: list[Tensor] | None = None  # measures of the source in this evaluation

    @hookimpl
    def data_needs(self) -> DataNeeds:
        """Nothing of its own: a run of this plugin alone trains on the source."""
        return DataNeeds(target=False)

    @hookimpl
    def build(self, model: UDA) -> None:
        """Refuse a quantile of a source that is not there."""
        if self.quantile is not None and not model.source_names:
            raise UDAError("Reject: a source-free run has no source samples for a quantile: give a threshold.")

    def measured(self, logits: Tensor) -> Tensor:
        """How strange samples of logits ``[B, C]`` are ``[B]``, float32."""
        return normalised_entropy(logits) if self.measure == "entropy" else energy(logits, self.temperature)

    @hookimpl
    def before_evaluation(self, model: UDA) -> None:
        """Where the target falls into two groups now."""
        pool = target_now(model) if self.split else None
        if pool is not None:
            self.limit.fill_(otsu(self.measured(pool.logits)))

    @hookimpl
    def reject(self, model: UDA, batch: DomainBatch, prediction: Prediction) -> Prediction:
        """Compare with the threshold; on a source, only take note."""
        confidence = self.measure == "confidence"
        found = 1 - prediction.score.float() if confidence else self.measured(batch.logits)
        if batch.role == "source":
            if self.quantile is not None:
                rows = slice(None) if model._trainer is None else model.owned_rows(batch.index)
                self._seen = [*(self._seen or []), found[rows]]
            return replace(prediction, unknown=None, unknown_score=found)
        if self._seen is not None:  # the first target batch after the sources; all ranks come here together
            self.limit.fill_(torch.quantile(gather_rows(torch.cat(self._seen)).double(), self.quantile).item())
            self._seen = None
        if self.threshold is not None:  # a checkpoint's limit is of its own threshold
            return prediction.rejecting(found > self.threshold, found)
        of = "cut of the target" if self.split else "quantile of the source"
        return prediction.rejecting(found > known_limit(model, self.limit, f"Reject: the {of}"), found)
