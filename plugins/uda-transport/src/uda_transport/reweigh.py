"""Double weighting inside a training: source samples count by how common their like is in the target."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

import uda
from uda.passes import Pools
from uda_transport.weighting import double_weights


class DoubleWeighting(uda.Plugin):
    """Weigh the source classification by double-weighting kernel mean matching (Segovia-Martin et al., ICML 2023).

    At the start of each epoch the features of both domains are matched by
    :func:`~uda_transport.weighting.double_weights`; ``b_i``, divided by its mean, weighs the cross-entropy of source
    sample i in the epoch. With ``leave: 0`` this is kernel mean matching; larger values do not force weights onto the
    few source samples near target samples that nothing in the source resembles. The paper's classifier, which weighs
    the target as well, is :class:`~uda_transport.minimax.DWGCSClassifier`.

    Args:
        leave: how far target samples may be left out, in [0, 1): ``1 - 1/sqrt(D)`` of the paper.
        most: bound of a weight before it is divided by the mean; the paper's is 1000, which lets few samples carry all.
        max_samples: most samples a domain that are matched; other source samples have the weight of the nearest one
            that was. Time grows with the square.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"leave": [0.0, 0.3, 0.6, 0.9], "most": (2.0, 1000.0, "log")}

    def __init__(self, leave: float = 0.3, most: float = 10.0, max_samples: int = 500) -> None:
        super().__init__()
        if not 0 <= leave < 1 or most <= 1 or max_samples < 2:
            raise uda.UDAError("DoubleWeighting: leave must be in [0, 1), most above 1 and max_samples 2 or more.")
        self.leave, self.most, self.max_samples = leave, most, max_samples

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains at the start of each epoch."""
        return uda.DataNeeds(refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """A weight for each source sample, 1 until the first epoch starts."""
        for number, name in enumerate(model.source_names):
            if f"weight{number}" not in self._buffers:
                self.register_buffer(f"weight{number}", torch.ones(max(model.sizes.get(name, 0), 1)))

    def weights(self, model: uda.UDA, name: str) -> Tensor:
        """Of the source ``name``, by position in its pool ``[N]``."""
        return self._buffers[f"weight{model.source_names.index(name)}"]

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Match each source with the target, as the network sees them now."""
        target = self._subset(bank.target.features, model.base_seed)[0]
        for name, pool in bank.sources.items():
            rows, chosen = self._subset(pool.features, model.base_seed)
            b, _ = double_weights(rows, target, self.leave, most=self.most)
            b = b / max(b.mean(), 1e-12)
            if chosen is not None:
                b = b[cKDTree(rows).query(pool.features.double().cpu().numpy())[1]]
            self.weights(model, name).copy_(torch.from_numpy(b / max(b.mean(), 1e-12)))

    def _subset(self, features: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray | None]:
        """At most ``max_samples`` rows; the same on all processes."""
        rows = features.double().cpu().numpy()
        if len(rows) <= self.max_samples:
            return rows, None
        chosen = np.random.default_rng(seed).permutation(len(rows))[: self.max_samples]
        return rows[chosen], chosen

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Weigh the source samples of the step."""
        for name, batch in step.sources.items():
            own = self.weights(step.model, name)[batch.index]
            batch.weight = own if batch.weight is None else own * batch.weight
