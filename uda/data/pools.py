"""Pools: which rows of the domains a task trains on and evaluates on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import LongTensor

from uda.data.classes import ClassSplit, LabelSpace, label_space, spelled
from uda.data.domains import DomainData
from uda.data.imbalance import kept
from uda.data.multilabel import is_multi_label, multi_label_names
from uda.data.readers import natural_order
from uda.data.settings import ClassCounts, check_setting
from uda.data.splits import split_by_class, split_by_index
from uda.errors import UDAError


@dataclass(frozen=True)
class Pool:
    """Rows of a domain in pool order.

    Args:
        rows: row of the domain at each pool position, int64 [N].
        labels: class id at each pool position, int64 [N] (-1: none, C and above: unknown, an id for each such class);
            multi-label: float32 [N, C].
    """

    rows: np.ndarray
    labels: LongTensor

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class DomainPools:
    """A domain's training pool and evaluation pool; they are one object where both are the same images."""

    data: DomainData
    is_target: bool
    train: Pool
    eval: Pool

    @property
    def name(self) -> str:
        """Of the domain."""
        return self.data.name


@dataclass(frozen=True)
class Task:
    """Everything that is known once the domains are read.

    ``labelled`` is there in a semi-supervised run only: class ids of the target's labelled training samples,
    -1 for the others, int64 [N]. ``setting`` is that of the label sets.
    """

    space: LabelSpace
    sources: list[DomainPools]
    target: DomainPools
    labelled: LongTensor | None = None
    setting: str = "closed"

    def all(self) -> list[DomainPools]:
        """Sources, then the target."""
        return [*self.sources, self.target]

    def __getitem__(self, name: str) -> DomainPools:
        for pools in self.all():
            if pools.name == name:
                return pools
        raise UDAError(f"domain {name!r} takes no part in this run, which has {[p.name for p in self.all()]}")


def _pool(rows: np.ndarray, ids: np.ndarray) -> Pool:
    return Pool(rows, torch.from_numpy(ids[rows]))


def source_pools(
    data: DomainData, space: LabelSpace, fraction: float, seed: int, keep: Mapping[str, float] | None = None
) -> DomainPools:
    """Stratified pools of a source; with fraction 0 it is evaluated on its training pool."""
    ids, rows = space.ids(data), space.source_rows(data)
    rows = rows[kept(data, space.class_names, keep)[rows]] if keep else rows
    if not len(rows):
        raise UDAError(f"source domain {data.name!r} has no image of a known or source-private class")
    if not space.multi_label:
        keep, back = split_by_class(ids[rows], fraction, seed, data.name)
    else:  # rows of several classes have no strata
        keep, back = split_by_index(len(rows), fraction, seed, data.name, "split")
    train = _pool(rows[keep], ids)
    return DomainPools(data, False, train, _pool(rows[back], ids) if len(back) else train)


def target_pools(
    data: DomainData,
    space: LabelSpace,
    fraction: float,
    seed: int,
    keep: Mapping[str, float] | None = None,
) -> DomainPools:
    """Pools of the target in an order without labels; with fraction 0 both are one (transductive)."""
    ids, rows = space.ids(data), space.target_rows(data)
    rows = rows[kept(data, space.class_names, keep)[rows]] if keep else rows
    if not len(rows):
        raise UDAError(f"target domain {data.name!r} has no image of a known or target-private class")
    order = data.inputs.order()
    if order is not None:
        rows = order[np.isin(order, rows)] if len(rows) < len(order) else order
    if not fraction:
        pool = _pool(rows, ids)
        return DomainPools(data, True, pool, pool)
    keep, back = split_by_index(len(rows), fraction, seed, data.name, "test")
    return DomainPools(data, True, _pool(rows[keep], ids), _pool(rows[back], ids))


def make_task(
    sources: list[DomainData],
    target: DomainData,
    split: ClassSplit | ClassCounts | None,
    allow_missing: bool,
    source_val_fraction: float,
    target_test_fraction: float,
    seed: int,
    keep: Mapping[str, Mapping[str, float]] | None = None,
    setting: str | None = None,
) -> Task:
    """Check the label space, thin classes and draw the splits."""
    names = natural_order(n for d in [*sources, target] if d.labels is not None for n in d.class_names)
    if split is not None:
        split = split.of(names) if isinstance(split, ClassCounts) else spelled(split, names)
    keep = keep or {}
    if is_multi_label([*sources, target]):
        space = LabelSpace(multi_label_names(sources, target, split, setting, keep), multi_label=True)
    else:
        space = label_space(sources, target, split, allow_missing, setting)
    setting = check_setting(setting, space.source_private, space.unknown)
    if stray := set(keep) - {d.name for d in [*sources, target]}:
        names = [d.name for d in [*sources, target]]
        raise UDAError(f"data.keep names {sorted(stray)[0]!r}, which is no domain of this run, which has {names}")
    return Task(
        space,
        [source_pools(d, space, source_val_fraction, seed, keep.get(d.name)) for d in sources],
        target_pools(target, space, target_test_fraction, seed, keep.get(target.name)),
        setting=setting,
    )
