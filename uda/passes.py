"""Whole-domain passes: one walk over a domain serves metrics, refreshes and banks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uda.nn.bank import gather_domain

if TYPE_CHECKING:
    from uda.module import UDA


@dataclass
class DomainPool:
    """The training pool of a domain as the model sees it now, in index order, equal on all ranks.

    Attributes:
        name: domain name; ``role``: ``"source"`` or ``"target"``.
        features: ``[N, F]``; ``logits``: ``[N, C]``; float32, on the model's device.
        y: class ids ``[N]`` on a source, None on a target: no target label comes this way. In a semi-supervised run
            (``data.labelled_target``) the target's labelled samples have theirs, and the others -1.
    """

    name: str
    role: str
    features: Tensor
    logits: Tensor
    y: Tensor | None = None

    def __len__(self) -> int:
        return len(self.features)


@dataclass
class Pools:
    """What :func:`uda.hookspecs.refresh` gets: pools of the roles that were asked for.

    Attributes:
        sources: source pools by domain name (empty when not asked for); ``target``: the target pool or None.
    """

    sources: dict[str, DomainPool]
    target: DomainPool | None

    @property
    def source(self) -> DomainPool | None:
        """The first source pool."""
        return next(iter(self.sources.values()), None)


@dataclass
class PoolCollector:
    """Collects rows of one domain, batch by batch and rank by rank."""

    name: str
    role: str
    size: int
    rows: list[tuple[Tensor, ...]] = field(default_factory=list)

    def add(self, index: Tensor, features: Tensor, logits: Tensor, y: Tensor | None) -> None:
        """Keep the rows of a batch; ``y`` only on a source."""
        keep_y = y if self.role == "source" and y is not None else torch.zeros_like(index)
        self.rows.append((index, features.float(), logits.float(), keep_y))

    def pool(self, model: UDA) -> DomainPool:
        """Bring the rows of all ranks together."""
        if self.rows:
            index, features, logits, y = (torch.cat(c) for c in zip(*self.rows, strict=True))
        else:  # a rank may own no row of a tiny domain
            index = y = torch.zeros(0, dtype=torch.long, device=model.device)
            features = torch.zeros(0, model.feature_dim, device=model.device)
            logits = torch.zeros(0, model.num_classes, device=model.device)
        y_all = gather_domain(self.size, index, y) if self.role == "source" else None
        return DomainPool(
            self.name, self.role, gather_domain(self.size, index, features), gather_domain(self.size, index, logits),
            y_all,
        )  # fmt: skip


def raw_inputs(model: UDA, name: str) -> Tensor:
    """Inputs of a domain's whole training pool in the test view ``[N, ...]``, in index order and equal on all ranks.

    For methods that look at the data themselves, such as fixed features; a domain of images may not fit into memory.
    """
    return map_pool(model, name, Tensor.float)


def map_pool(model: UDA, name: str, look: Callable[[Tensor], Tensor], views: Any = None) -> Tensor:
    """``look`` of the inputs of a domain's whole training pool ``[N, ...]``, in index order and equal on all ranks.

    Args:
        look: ``[B, ...]`` to rows ``[B, ...]``, of the inputs in the test view.
        views: other transforms than the run's, for a second network.
    """
    trainer, index, rows = model.trainer, [], []
    for batch in trainer.datamodule.pool_dataloader(name, views):
        batch = trainer.strategy.batch_to_device(batch, model.device)
        own = model.owned_rows(batch["index"])
        index.append(batch["index"][own])
        rows.append(look(batch["x"][own]))
    return gather_domain(model.sizes[name], torch.cat(index), torch.cat(rows))


@contextmanager
def evaluating(model: UDA) -> Iterator[None]:
    """All parts in evaluation mode, and afterwards each in the mode that it was in."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def walk(model: UDA, name: str, role: str, loader: Any) -> DomainPool:
    """Pass the whole pool of a domain through the model in evaluation mode, without touching any random state.

    Under DDP each rank walks its own share through the bare module.
    """
    from uda.step import DomainBatch

    trainer = model.trainer
    collector = PoolCollector(name, role, model.sizes[name])
    with evaluating(model):
        for batch in loader:
            batch = trainer.strategy.batch_to_device(batch, model.device)
            rows = model.owned_rows(batch["index"])
            with trainer.precision_plugin.val_step_context():
                domain = DomainBatch(model, name, role, batch)
                features, logits = domain.features, domain.logits
            y = batch.get("y")
            collector.add(batch["index"][rows], features[rows], logits[rows], None if y is None else y[rows])
    return collector.pool(model)


def target_now(model: UDA) -> DomainPool | None:
    """The target's training pool through the model as it is, without labels; None where no data module is at hand.

    For the hook ``before_evaluation``: costs one pass over the target.
    """
    trainer = model._trainer
    if trainer is None or trainer.sanity_checking or getattr(trainer, "datamodule", None) is None:
        return None
    return walk(model, model.target_name, "target", trainer.datamodule.pool_dataloader(model.target_name))
