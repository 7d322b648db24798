"""Source samples for what a method makes ready before its stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from uda.errors import UDAError


@dataclass(frozen=True)
class SourceSamples:
    """Samples of the source domains, in memory.

    Attributes:
        x: inputs ``[N, ...]``, as the model takes them; y: class ids ``[N]``, or None.
        domain: number of each sample's domain ``[N]``, or None.
    """

    x: Tensor
    y: Tensor | None = None
    domain: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("y", "domain"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.x):
                raise UDAError(f"SourceSamples: {len(self.x)} inputs and {len(value)} of {name!r}.")

    def __len__(self) -> int:
        return len(self.x)

    @classmethod
    def take(cls, loaders: Iterable[Any], limit: int = 2000, labels: bool = True) -> SourceSamples:
        """The first ``limit`` samples of each domain's loader (a list: a loader a domain).

        Args:
            loaders: of ``{"x": ..., "y": ...}``, ``(x, y)`` or ``x``; labels: take them along.

        Raises:
            UDAError: no sample.
        """
        parts: dict[str, list[Tensor]] = {"x": [], "y": [], "domain": []}
        for d, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
            left = limit
            for batch in loader:
                x, y = (batch["x"], batch.get("y")) if isinstance(batch, dict) else cls._pair(batch)
                if y is not None:  # -1: an image that could not be read, and was skipped
                    x, y = x[y >= 0], y[y >= 0]
                parts["x"].append(x[:left])
                parts["domain"].append(torch.full((len(x[:left]),), d))
                if labels and y is not None:
                    parts["y"].append(y[:left])
                left -= len(x)
                if left <= 0:
                    break
        if not sum(map(len, parts["x"])):
            raise UDAError("There are no source samples to make the method ready with.")
        y = torch.cat(parts["y"]) if sum(map(len, parts["y"])) == sum(map(len, parts["x"])) else None
        return cls(torch.cat(parts["x"]), y, torch.cat(parts["domain"]))

    @staticmethod
    def _pair(batch: Any) -> tuple[Tensor, Tensor | None]:
        return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1] if len(batch) > 1 else None)

    def batches(self, size: int, generator: Generator | None = None) -> Iterator[dict[str, Tensor]]:
        """One pass over ``{"x", "y", "domain"}``, shuffled by ``generator``, in order without one.

        The last batch may be smaller.
        """
        n = len(self.x)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        fields = {k: v for k in ("x", "y", "domain") if (v := getattr(self, k)) is not None}
        for rows in order.split(size):
            yield {k: v[rows] for k, v in fields.items()}

    def domain_batches(self, size: int, generator: Generator) -> Iterator[dict[str, Tensor]]:
        """As many batches as one pass has, each of one domain: episodes. Domains come with equal chance.

        No sample occurs twice in a batch; that of a domain with fewer than ``size`` samples is smaller.
        """
        members = [(self.domain == d).nonzero().flatten() for d in self.domain.unique()]
        for _ in range(max(1, len(self) // size)):
            rows = members[int(torch.randint(len(members), (), generator=generator))]
            rows = rows[torch.randperm(len(rows), generator=generator)[:size]]
            yield {"x": self.x[rows], "domain": self.domain[rows], **({} if self.y is None else {"y": self.y[rows]})}
