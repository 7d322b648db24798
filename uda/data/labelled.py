"""Labelled samples of the target: the semi-supervised setting, for runs that ask for it by name and no other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from uda.data.pools import DomainPools, Pool, Task
from uda.data.samplers import permutation
from uda.errors import UDAError


def with_labelled_target(task: Task, number: int, seed: int) -> Task:
    """Give ``number`` samples a class of the target's training pool their label in training.

    Which ones is a function of the seed. They stay in the pool as unlabelled samples as well, and are taken out of the
    evaluation: their label there becomes -1. Classes without any target sample are left out.

    Raises:
        UDAError: no target labels, or a class that has not more samples than that.
    """
    pools, names = task.target, task.space.class_names
    labels = pools.train.labels.numpy()
    known = np.full(len(labels), -1, dtype=np.int64)
    for c, name in enumerate(names):
        rows = np.flatnonzero(labels == c)
        if 0 < len(rows) <= number:
            raise UDAError(
                f"data.labelled_target: {number}, but class {name!r} has only {len(rows)} samples in the target "
                f"{pools.name!r}, and some must stay to be measured on; ask for fewer"
            )
        known[rows[permutation(len(rows), seed, pools.name, "labelled_target", c)[:number]]] = c
    if (known < 0).all():
        raise UDAError(f"data.labelled_target: {number}, but the target domain {pools.name!r} has no labels")
    train = Pool(pools.train.rows, torch.from_numpy(np.where(known >= 0, -1, labels)))
    target = DomainPools(pools.data, True, train, train if pools.eval is pools.train else pools.eval)
    return replace(task, target=target, labelled=torch.from_numpy(known))
