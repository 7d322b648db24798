"""The methods in ``uda test`` and ``uda predict``: the hook ``adapt``, by the same adapter as in a service."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

import uda
from uda.errors import UDAError, check_choice
from uda_testtime.adapter import Adapter, Guard
from uda_testtime.methods import LAME, TENT, BNStatistics, Source
from uda_testtime.reliable import ETA, SAR

METHODS = {m.__name__: m for m in (Source, BNStatistics, TENT, ETA, SAR, LAME)}


class TestTime(uda.Plugin):
    """Adapt to the target as a stream, in ``uda test`` and ``uda predict``; training is left alone.

    A copy of backbone, bottleneck and classifier adapts; the model keeps its weights. Each pass starts from the source.

    Args:
        method: ``Source``, ``BNStatistics``, ``TENT``, ``ETA``, ``SAR`` or ``LAME``; arguments: of its constructor.
        guard: arguments of :class:`~uda_testtime.Guard`; None: none.
        updates_per_batch: of :class:`~uda_testtime.Adapter`.
    """

    __test__ = False  # no test class, whatever its name
    settings = ("closed", "partial", "multi-source", "source-free", "test-time")

    def __init__(
        self, method: str = "TENT", arguments: dict[str, Any] | None = None, guard: dict[str, float] | None = None,
        updates_per_batch: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("TestTime", "method", method, METHODS)
        self.method = METHODS[method](**(arguments or {}))
        self.guard, self.updates_per_batch = Guard(**guard) if guard is not None else None, updates_per_batch
        self.__dict__["live"] = None  # an adapter belongs to a pass, not to a checkpoint

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source batches only."""
        return uda.DataNeeds(target=False)

    @uda.hookimpl
    def adapt(self, model: uda.UDA, batch: uda.DomainBatch) -> Tensor:
        """Logits of the adapter; the batch with the pool's first sample starts a stream."""
        if self.live is None or (batch.index is not None and bool((batch.index == 0).any())):
            if model.hooks.filled("transform_features"):
                raise UDAError("TestTime: another plugin changes the features, which the adapted copy would not have.")
            parts = OrderedDict((n, getattr(model, n)) for n in ("backbone", "bottleneck", "head"))
            self.__dict__["live"] = Adapter(
                nn.Sequential(parts), self.method, "head", self.guard, self.updates_per_batch
            )
        return self.live(batch.x)
