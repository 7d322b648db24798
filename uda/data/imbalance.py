"""Class-imbalanced domains: some classes keep a share of their samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from uda.data.domains import DomainData
from uda.data.samplers import permutation
from uda.errors import UDAError, nearest

HALVES = ("first_half", "second_half")


def check_keep(keep: Any) -> dict[str, dict[str, float]]:
    """``{domain: {class name or half: share}}`` as text and numbers, after checking the shares.

    Raises:
        UDAError: another shape, or a share outside of (0, 1].
    """
    if not isinstance(keep or {}, Mapping) or not all(isinstance(v, Mapping) for v in (keep or {}).values()):
        raise UDAError(f"data.keep is a mapping such as {{my_domain: {{first_half: 0.3}}}}, not {keep!r}")
    out = {str(d): {str(k): float(v) for k, v in shares.items()} for d, shares in (keep or {}).items()}
    for domain, shares in out.items():
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise UDAError(f"data.keep.{domain}.{name} is a share in (0, 1], not {share:g}")
    return out


def class_shares(names: list[str], shares: Mapping[str, float]) -> dict[str, float]:
    """Share that each class keeps.

    Args:
        names: class names in id order; ``first_half`` are the first ``floor(C / 2)`` of them.
        shares: share by class name or half; a class that is named itself overrides its half.

    Raises:
        UDAError: a name that is no class and no half.
    """
    half = len(names) // 2
    members = {"first_half": names[:half], "second_half": names[half:], **{n: [n] for n in names}}
    for name in shares:
        if name not in members:
            raise UDAError(f"data.keep names {name!r}, which is no class. {nearest(name, [*names, *HALVES])}")
    ordered = sorted(shares, key=lambda name: name in names)  # halves first
    return {n: shares[key] for key in ordered for n in members[key]}


def kept(data: DomainData, names: list[str], shares: Mapping[str, float]) -> np.ndarray:
    """Which rows of a domain stay, bool ``[N]``: ``round(share n)`` of a class of n, at least one.

    The choice depends on the names of domain and class alone: all runs, whatever their seed, see one data set.

    Args:
        data: the domain.
        names: known class names in id order, for the halves; classes outside of them may be named as well.
        shares: share by class name or half.

    Raises:
        UDAError: a domain without labels; a name that is no class.
    """
    mask = np.ones(len(data), dtype=bool)
    if not shares:
        return mask
    if data.labels is None:
        raise UDAError(f"data.keep names domain {data.name!r}, which has no labels to thin its classes by")
    labels = data.labels.numpy()
    extra = {n: s for n, s in shares.items() if n in data.class_names and n not in names}
    known = {n: s for n, s in shares.items() if n not in extra}
    for name, share in {**class_shares(names, known), **extra}.items():
        if name not in data.class_names:
            continue
        members = np.flatnonzero(labels == data.class_names.index(name))
        count = max(1, round(share * len(members)))
        mask[members[permutation(len(members), 0, data.name, "keep", name)[count:]]] = False
    return mask
