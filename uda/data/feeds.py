"""Which loaders a run gets: streams for training, sharded passes for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from uda.data.batches import BadImageLog, BatchDataset
from uda.data.loaders import ShardedLoader, StreamLoader
from uda.data.pools import DomainPools, Pool, Task
from uda.data.samplers import ClassBalancedStream, UniformStream
from uda.data.splits import split_by_index
from uda.data.views import Views
from uda.errors import UDAError


@dataclass
class Feeds:
    """Makes loaders for one process of a run.

    Args:
        task: domains and their pools.
        views: the transforms.
        seed: of order and augmentation.
        rank, world: of this process, and how many there are.
        done: gives the number of training batches behind the run.
        log: of skipped images.
        on_bad_image: ``stop`` or ``skip``.
        workers, pin: of each loader.
    """

    task: Task
    views: Views
    seed: int
    rank: int = 0
    world: int = 1
    done: Callable[[], int] = lambda: 0
    log: BadImageLog = field(default_factory=BadImageLog)
    on_bad_image: Literal["stop", "skip"] = "stop"
    workers: int = 0
    pin: bool = False

    def training(
        self,
        needs: Any,
        batch_size: int,
        target_batch_size: int,
        epoch_steps: int | None,
        held_out_fraction: float,
        class_balanced: bool,
    ) -> dict[str, Any]:
        """Stream loaders ``{"sources": {name: loader}, "target": loader, "held_out": loader}``, those needed.

        In a semi-supervised task ``"labelled"`` is among them: the labelled target samples, with ``y``.

        Raises:
            UDAError: nothing is needed that the task has; held-out batches are needed but their share is 0.
        """
        sources = self.task.sources if needs.source else []
        target = self.task.target
        if needs.source and not sources:
            raise UDAError(
                "the model needs source batches, but data.source is empty; name a source, "
                "or use source-free methods only"
            )
        if not needs.source and not needs.target and not needs.held_out:
            raise UDAError("nothing to train on: the model needs neither source nor target batches")
        used = [(len(p.train), batch_size) for p in sources]
        used += [(len(target.train), target_batch_size)] if needs.target or needs.held_out else []
        steps = epoch_steps or max(-(-n // (batch * self.world)) for n, batch in used)

        loaders: dict[str, Any] = {}
        if sources:
            balanced = class_balanced or needs.class_balanced
            loaders["sources"] = {
                p.name: self._source(p, batch_size, steps, needs.source_views, balanced) for p in sources
            }
        members = {"target": np.arange(len(target.train))}
        if needs.held_out:
            if not held_out_fraction:
                raise UDAError("a plugin needs held-out target batches: set data.held_out_fraction above 0")
            members["target"], members["held_out"] = split_by_index(
                len(target.train), held_out_fraction, self.seed, target.name, "held_out"
            )
        for role in members:
            if role == "held_out" or needs.target:
                stream = UniformStream(members[role], self.seed, f"{role}/{target.name}")
                dataset = self.dataset(target, target.train, _with_views(needs.views))
                loaders[role] = self._stream(dataset, stream, target_batch_size, steps, target.name)
        if (known := self.task.labelled) is not None:
            members = np.flatnonzero(known.numpy() >= 0)
            dataset = self.dataset(target, Pool(target.train.rows, known), _with_views(frozenset()), labelled=True)
            stream = UniformStream(members, self.seed, f"labelled/{target.name}")
            size = min(target_batch_size, max(1, len(members) // self.world))
            loaders["labelled"] = self._stream(dataset, stream, size, steps, target.name)
        return loaders

    def _source(
        self, pools: DomainPools, batch_size: int, steps: int, views: frozenset[str], balanced: bool
    ) -> StreamLoader:
        name, labels = f"source/{pools.name}", pools.train.labels
        stream = (
            ClassBalancedStream(labels.numpy(), self.seed, name)
            if balanced
            else UniformStream(len(labels), self.seed, name)
        )
        dataset = self.dataset(pools, pools.train, _with_views(views), labelled=True)
        return self._stream(dataset, stream, batch_size, steps, pools.name)

    def _stream(
        self, dataset: BatchDataset, stream: Any, batch_size: int, steps: int, name: str
    ) -> StreamLoader:
        return StreamLoader(
            dataset,
            stream,
            batch_size,
            steps,
            self.seed,
            name,
            self.rank,
            self.world,
            self.done,
            self.log,
            self.workers,
            self.pin,
        )

    def sharded(self, pools: DomainPools, pool: Pool, batch_size: int, labelled: bool) -> ShardedLoader:
        """One pass over a pool in index order, test view, this rank's share."""
        dataset = self.dataset(pools, pool, {"x": "test"}, labelled, replace_index=False)
        return ShardedLoader(
            dataset, batch_size, pools.name, self.rank, self.world, self.log, self.workers, self.pin
        )

    def dataset(
        self,
        pools: DomainPools,
        pool: Pool,
        wanted: dict[str, str],
        labelled: bool = False,
        replace_index: bool = True,
    ) -> BatchDataset:
        """Batches of a pool; labels go in only where ``labelled``."""
        labels = pool.labels if labelled else None
        return BatchDataset(
            pools.data.inputs, pool.rows, self.views, wanted, labels, self.on_bad_image, replace_index
        )


def _with_views(views: frozenset[str]) -> dict[str, str]:
    return {"x": "train", **{v: v for v in sorted(views)}}
