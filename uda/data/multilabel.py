"""Multi-label domains: a row may have any number of the classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from uda.errors import UDAError

if TYPE_CHECKING:
    from uda.data.classes import ClassSplit
    from uda.data.domains import DomainData


def multi_hot(y: np.ndarray, given: np.ndarray | None, where: str) -> tuple[Tensor, list[str]]:
    """Labels of 0 and 1 as float32 ``[N, C]``, and a name for each column (its number, where none are given).

    Raises:
        UDAError: another shape, other values, or another number of names.
    """
    if y.ndim != 2 or y.shape[1] < 2:
        raise UDAError(f"multi-label labels {where} must be of shape [N, C] with C of 2 or more, not {list(y.shape)}")
    if not np.isin(y, (0, 1)).all():
        raise UDAError(f"multi-label labels {where} must be 0 or 1: leave the key away for an unlabelled domain")
    names = [str(i) for i in range(y.shape[1])] if given is None else [str(n) for n in given]
    if len(names) != y.shape[1]:
        raise UDAError(f"labels {where} have {y.shape[1]} columns, but there are {len(names)} class names")
    return torch.from_numpy(y.astype(np.float32)), names


def is_multi_label(domains: list[DomainData]) -> bool:
    """Whether the domains of a task are multi-label.

    Raises:
        UDAError: some are and others are not.
    """
    kinds = {d.name: d.multi_label for d in domains}
    if len(set(kinds.values())) > 1:
        raise UDAError(f"domains {sorted(kinds)} must all be multi-label or all have one class a row: {kinds}")
    return any(kinds.values())


def multi_label_names(
    sources: list[DomainData],
    target: DomainData,
    split: ClassSplit | None,
    setting: str | None,
    keep: Mapping[str, Any],
) -> list[str]:
    """Class names in id order: those of ``classes.known``, or of the columns.

    Raises:
        UDAError: no labelled domain and no names, a source without labels, a class that a labelled domain lacks, or
            what has no meaning for rows of several classes (open settings, private classes, ``keep``).
    """
    private = split is not None and (split.source_private or split.target_private)
    if setting not in (None, "closed") or keep or private:
        raise UDAError(
            "multi-label tasks are of the closed set: data.setting, data.keep and private classes have no meaning "
            "where a row may have several classes. Leave them out."
        )
    for data in sources:
        if data.labels is None:
            raise UDAError(f"source domain {data.name!r} has no labels; only the target may be unlabelled")
    labelled = [d for d in [*sources, target] if d.labels is not None]
    if not labelled and split is None:
        raise UDAError(f"no class is known: target {target.name!r} has no labels; give data.classes.known")
    names = list(split.known) if split is not None else list(labelled[0].class_names)
    for data in labelled:
        if lacking := [n for n in names if n not in data.class_names]:
            raise UDAError(f"class {lacking[0]!r} has no column in multi-label domain {data.name!r}")
        if split is None and (more := [n for n in data.class_names if n not in names]):
            raise UDAError(f"class {more[0]!r} of domain {data.name!r} has no column in {labelled[0].name!r}")
    return names


def columns(data: DomainData, names: list[str]) -> np.ndarray:
    """Labels float32 ``[N, C]`` in the order of the names; -1 throughout where there are none."""
    if data.labels is None:
        return np.full((len(data), len(names)), -1, dtype=np.float32)
    return data.labels.numpy()[:, [data.class_names.index(n) for n in names]]
