"""Loaders: batches by request, endless for training and sharded for evaluation.

Neither loader is a ``torch.utils.data.DataLoader``: Lightning leaves them alone, so that no sampler of its
own replaces the order here. Inside, a DataLoader runs the workers; its "index" is a whole batch request.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from torch import Generator
from torch.utils.data import DataLoader

from uda.data.batches import BadImageLog, Batch, BatchDataset, Request
from uda.data.samplers import ClassBalancedStream, UniformStream, derive_seed, rank_slice, shard


def _as_is(batch: Batch) -> Batch:
    return batch


class _Requests:
    """The DataLoader's sampler: hands out the iterator that was last put in."""

    def __init__(self) -> None:
        self.requests: Iterator[Request] = iter(())

    def __iter__(self) -> Iterator[Request]:
        return self.requests


class _Loader:
    """A DataLoader over requests, with the skipped images taken out of its batches and reported."""

    def __init__(
        self, dataset: BatchDataset, name: str, log: BadImageLog, workers: int, pin: bool, keep: bool
    ) -> None:
        self.dataset, self.name, self.log = dataset, name, log
        self._requests = _Requests()
        self._live: Any = None
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=self._requests,
            num_workers=workers,
            pin_memory=pin,
            collate_fn=_as_is,
            persistent_workers=keep and workers > 0,
            generator=Generator(),  # of its own: iterating must not draw from the run's random numbers
        )

    @property
    def _iterator(self) -> Any:
        """The iterator of the workers, where Lightning looks for it to end them.

        Left to the garbage collector, workers may wait five seconds each: their queue can be closed before
        they are told to end.
        """
        return self._live

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self._live = self._loader._iterator = value

    def _iterate(self, requests: Iterator[Request], length: int) -> Iterator[Batch]:
        self.log.report(self.name)  # what an epoch that was cut short left behind
        self._requests.requests = requests
        live = self._live = iter(self._loader)
        try:
            for number, batch in enumerate(live, 1):
                if "bad" in batch:
                    self.log.add(self.name, batch.pop("bad"))
                if number == length:
                    self.log.report(self.name)
                yield batch
        finally:
            if not self._loader.persistent_workers and hasattr(live, "_shutdown_workers"):
                live._shutdown_workers()


class StreamLoader(_Loader):
    """``steps`` batches an epoch from an endless stream, starting where the run stands.

    Args:
        dataset: gives the batches.
        stream: order of the pool.
        batch_size: rows a rank and step.
        steps: batches an epoch.
        seed: of the run; the augmentation of a batch is a function of (seed, name, step, rank).
        name: of the domain.
        rank, world: of this process, and how many there are.
        done: gives the number of training batches that the run has behind it, asked when an epoch starts.
        log: of skipped images.
        workers, pin: of the DataLoader.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        stream: UniformStream | ClassBalancedStream,
        batch_size: int,
        steps: int,
        seed: int,
        name: str,
        rank: int = 0,
        world: int = 1,
        done: Callable[[], int] = lambda: 0,
        log: BadImageLog | None = None,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        super().__init__(dataset, name, log or BadImageLog(), workers, pin, keep=True)
        self.stream, self.batch_size, self.steps, self.seed = stream, batch_size, steps, seed
        self.rank, self.world, self._done = rank, world, done

    def __len__(self) -> int:
        return self.steps

    def request(self, step: int) -> Request:
        """What this rank trains on at a step, counted from the start of the run."""
        positions = self.stream.take(*rank_slice(step, self.batch_size, self.rank, self.world))
        return Request(positions, derive_seed(self.seed, self.stream.name, "augment", step, self.rank))

    def __iter__(self) -> Iterator[Batch]:
        # A resumed epoch asks for less than ``steps``: the trainer stops by its own count, more does no harm.
        return self._iterate(self._requests_from_now(), self.steps)

    def _requests_from_now(self) -> Iterator[Request]:
        # Asked at the first batch, not when the iterator is made: a trainer that estimates the number of
        # steps for a learning-rate schedule makes it before it restores its counters.
        first = self._done()
        for i in range(self.steps):
            yield self.request(first + i)

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on. There is no position in it: that is the trainer's batch count."""
        return {
            "domain": self.name,
            "seed": self.seed,
            "global_batch": self.batch_size * self.world,
            "size": len(self.stream),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Warn when a resumed run will not see the order that the interrupted one would have seen."""
        now = self.state_dict()
        changed = [f"{k} {state[k]!r} -> {now[k]!r}" for k in now if k in state and state[k] != now[k]]
        if changed:
            warnings.warn(
                f"resumed with other data settings ({'; '.join(changed)}): "
                "the order of samples differs from here on",
                stacklevel=2,
            )


class ShardedLoader(_Loader):
    """One pass over a pool in index order, split over ranks: rank r has indices r, r + W, ...

    All ranks have equally many batches; a rank that is one row short has index 0 at its end. Drop such rows
    with :func:`uda.data.valid_rows` before counting.

    Args: as for :class:`StreamLoader`.
    """

    def __init__(
        self,
        dataset: BatchDataset,
        batch_size: int,
        name: str,
        rank: int = 0,
        world: int = 1,
        log: BadImageLog | None = None,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        super().__init__(dataset, name, log or BadImageLog(), workers, pin, keep=False)
        self.batch_size, self.positions = batch_size, shard(len(dataset), rank, world)

    def __len__(self) -> int:
        return -(-len(self.positions) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        starts = range(0, len(self.positions), self.batch_size)
        return self._iterate((Request(self.positions[s : s + self.batch_size], 0) for s in starts), len(self))

    def shuffled(self, seed: int) -> ShardedLoader:
        """This loader, with this rank's share in random order.

        For passes in which a batch has a meaning of its own: image folders and many files are sorted by class, so that
        batches in index order hold a class each.
        """
        self.positions = np.random.default_rng(seed).permutation(self.positions)
        return self
