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


class Reject(Plugin):
    """Marks a target sample as unknown where it looks strange; trains nothing, and goes with every method.

    What is compared with the threshold is ``unknown_score`` of the prediction afterwards. No target label and no
    target sample has a part in the threshold. Sources are never rejected.

    Args:
        measure: ``entropy``: that of the softmax over ``log C``, in [0, 1]; ``confidence``: one minus the score of the
            prediction, whoever made it (by default the largest softmax); ``energy``: ``-T log sum exp(z / T)``.
        threshold: a sample is unknown above it. None: from ``quantile``, or, where that is None too, 0.5 of the entropy
            (``0.5 log C``, the centre of DANCE's margin).
        quantile: the threshold is this quantile of the measure over the held-out source samples
            (``data.source_val_fraction``), taken anew in each evaluation: about this share of the source would stay
            known. ``uda predict`` takes that of the last evaluation before the checkpoint.
        temperature: T of the energy.
    """

    settings = tuple(s for s in SETTINGS if s != "multi-label")
    limit: Tensor

    def __init__(
        self,
        measure: str = "entropy",
        threshold: float | None = None,
        quantile: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        if measure not in MEASURES:
            raise UDAError(f"Reject: unknown measure {measure!r}. {nearest(str(measure), MEASURES)}")
        if threshold is not None and quantile is not None:
            raise UDAError("Reject takes a threshold or a quantile, not both.")
        if quantile is not None and not 0 < quantile < 1:
            raise UDAError(f"Reject: quantile must be between 0 and 1, got {quantile}.")
        if temperature <= 0:
            raise UDAError(f"Reject: temperature must be positive, got {temperature}.")
        if threshold is None and quantile is None:
            if measure != "entropy":
                raise UDAError(f"Reject: {measure} has no threshold of its own: give threshold or quantile.")
            threshold = 0.5
        self.measure, self.threshold, self.quantile, self.temperature = measure, threshold, quantile, temperature
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

    def measured(self, batch: DomainBatch, prediction: Prediction) -> Tensor:
        """How strange the samples are ``[B]``, float32."""
        if self.measure == "confidence":
            return 1 - prediction.score.float()
        return normalised_entropy(batch.logits) if self.measure == "entropy" else energy(batch.logits, self.temperature)

    @hookimpl
    def reject(self, model: UDA, batch: DomainBatch, prediction: Prediction) -> Prediction:
        """Compare with the threshold; on a source, only take note."""
        found = self.measured(batch, prediction)
        if batch.role == "source":
            if self.quantile is not None:
                rows = slice(None) if model._trainer is None else model.owned_rows(batch.index)
                self._seen = [*(self._seen or []), found[rows]]
            return replace(prediction, unknown=None, unknown_score=found)
        if self._seen is not None:  # the first target batch after the sources; all ranks come here together
            self.limit.fill_(torch.quantile(gather_rows(torch.cat(self._seen)).double(), self.quantile).item())
            self._seen = None
        if math.isnan(self.limit.item()):
            raise UDAError("Reject: the quantile of the source is not known yet: validate or fit first.")
        return prediction.rejecting(found > self.limit, found)
