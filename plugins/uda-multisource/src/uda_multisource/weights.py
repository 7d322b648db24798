"""How much each source counts in the classification."""

from __future__ import annotations

import torch

import uda
from uda.errors import check_choice, nearest
from uda_multisource.several import require_several


class SourceWeights(uda.Plugin):
    """Weigh the sources: ``L_cls = sum_i w_i CE_i`` with ``sum_i w_i = 1``.

    Without it all sources count alike. ``by: size`` is the source-combine baseline of the literature, in which the
    sources are one pool and each image counts alike. Every source gives ``data.batch_size`` images a step, so that a
    weight is in expectation what drawing a source in that share would be. Multiplies weights that other plugins have
    set.

    Args:
        by: ``equal``, ``size`` (of the training pools) or ``given``.
        shares: for ``given``, a number for each source by name; they need not sum to 1.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source")

    def __init__(self, by: str = "size", shares: dict[str, float] | None = None) -> None:
        super().__init__()
        check_choice("SourceWeights", "by", by, ("equal", "size", "given"))
        self.by, self.shares = by, dict(shares or {})
        if (by == "given") != bool(self.shares):
            raise uda.UDAError("SourceWeights: give shares with by: given, and with nothing else.")
        if any(v < 0 for v in self.shares.values()) or (self.shares and not sum(self.shares.values())):
            raise uda.UDAError(f"SourceWeights: shares must not be negative, nor all zero: {self.shares}.")

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Check the names."""
        names = require_several(model, "SourceWeights", "no weights")
        for name in self.shares:
            if name not in names:
                raise uda.UDAError(f"SourceWeights: no source {name!r} in this run. {nearest(name, names)}")
        if self.shares and (missing := [n for n in names if n not in self.shares]):
            raise uda.UDAError(f"SourceWeights: no share for source {missing[0]!r}; 0 leaves one out.")

    def of(self, model: uda.UDA) -> dict[str, float]:
        """Weight of each source, of sum 1."""
        raw = {n: self.shares.get(n, 1.0) if self.by != "size" else float(model.sizes[n]) for n in model.source_names}
        total = sum(raw.values())
        return {n: v / total for n, v in raw.items()}

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Sources alone."""
        return uda.DataNeeds(target=False)

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Weigh the samples: the skeleton takes the mean over M sources."""
        for name, weight in self.of(step.model).items():
            batch = step.sources[name]
            one = batch.x.new_full((len(batch),), weight * len(step.sources), dtype=torch.float32)
            batch.weight = one if batch.weight is None else one * batch.weight
