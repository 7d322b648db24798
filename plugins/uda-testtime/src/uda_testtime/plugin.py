"""The methods in ``uda test`` and ``uda predict``: the hook ``adapt``, by the same adapter as in a service."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

import uda
from uda.errors import UDAError, nearest
from uda_testtime.adapter import Adapter
from uda_testtime.method import Guard, Method
from uda_testtime.registry import make_method
from uda_testtime.source import SourceSamples

#: What ``stream`` may hold: options of ``uda adapt`` that say which stream is walked.
STREAM = ("setting", "shifts", "corruptions", "severity", "cache", "batch_size", "order_seed", "delta", "limit")


class TestTime(uda.Plugin):
    """Adapt to the target as a stream, in ``uda test`` and ``uda predict``; training is left alone.

    A copy of backbone, bottleneck and classifier adapts; the model keeps its weights. Each pass starts from the source.

    Args:
        method: name of a method (``TENT``, ``BNStatistics``, ...; docs/methods/testtime.md) or class path of a
            :class:`~uda_testtime.Method`; arguments: of its constructor.
        guard: arguments of :class:`~uda_testtime.Guard`; None: none.
        updates_per_batch: of :class:`~uda_testtime.Adapter`; seed: of the method's random numbers.
        prepared: file of :meth:`~uda_testtime.Adapter.save_prepared`, for methods that need source data once; None:
            they are made ready with the data module's sources.
        source_samples: at most so many of each source for that.
        stream: options of ``uda adapt`` by name (``setting``, ``corruptions``, ``batch_size``, ...), which its command
            line overrides; ``uda test`` and ``uda predict`` walk the target as it is.

    Raises:
        UDAError: an unknown method, argument of it, or option of a stream.
    """

    __test__ = False  # no test class, whatever its name
    settings = ("closed", "partial", "multi-source", "source-free", "test-time")

    def __init__(
        self, method: str = "TENT", arguments: dict[str, Any] | None = None, guard: dict[str, float] | None = None,
        updates_per_batch: float | None = None, seed: int = 0, prepared: str | None = None, source_samples: int = 2000,
        stream: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if strange := [name for name in stream or {} if name not in STREAM]:
            raise UDAError(f"TestTime: stream has no {strange[0]!r}. {nearest(strange[0], STREAM)}")
        self.method = make_method(method, arguments)
        self.guard, self.updates_per_batch = Guard(**guard) if guard is not None else None, updates_per_batch
        self.seed, self.prepared, self.source_samples = seed, prepared, source_samples
        self.stream = dict(stream or {})
        self.__dict__["live"] = None  # an adapter belongs to a pass, not to a checkpoint

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Source batches only."""
        return uda.DataNeeds(target=False)

    @uda.hookimpl
    def adapt(self, model: uda.UDA, batch: uda.DomainBatch) -> Tensor:
        """Logits of the adapter; the batch with the pool's first sample starts a stream."""
        if self.live is None or (batch.index is not None and bool((batch.index == 0).any())):
            datamodule = getattr(model._trainer, "datamodule", None)
            self.__dict__["live"] = adapter_of(
                model, self.method, datamodule, prepared=self.prepared, **self.options()
            )
        return self.live(batch.x)

    def options(self) -> dict[str, Any]:
        """What else :func:`adapter_of` takes from the arguments."""
        return {n: getattr(self, n) for n in ("source_samples", "guard", "updates_per_batch", "seed")}


def adapter_of(
    model: uda.UDA, method: Method, datamodule: Any = None, prepared: str | None = None, source_samples: int = 2000,
    **options: Any,
) -> Adapter:  # fmt: skip
    """The adapter of a :class:`uda.UDA`, made ready: from a file, or with the data module's sources.

    Args:
        model: its backbone, bottleneck and head are copied; datamodule: gives sources and the scale of pixels.
        prepared, source_samples: as in :class:`TestTime`; **options: of :class:`~uda_testtime.Adapter`.

    Raises:
        UDAError: a plugin that changes the features, or a method without what it needs.
    """
    if model.hooks.filled("transform_features"):
        raise UDAError("TestTime: another plugin changes the features, which the adapted copy would not have.")
    parts = OrderedDict((n, getattr(model, n)) for n in ("backbone", "bottleneck", "head"))
    scale = getattr(datamodule, "views", None)
    options |= {n: getattr(scale, n, None) for n in ("mean", "std")}
    out = Adapter(nn.Sequential(parts), method, "head", **options)
    sources = list(getattr(datamodule, "source_names", ()))
    if method.needs == "nothing":
        return out
    if prepared:
        out.load_prepared(prepared)
    elif sources:
        loaders = [datamodule.pool_dataloader(name) for name in sources]
        out.prepare(SourceSamples.take(loaders, source_samples, labels=method.needs != "inputs"))
    out.check_ready()
    return out
