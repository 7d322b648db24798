"""Adaptation, generalisation and forgetting of a model that goes through a sequence of domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Row = Mapping[str, float | None]


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def sequence_measures(rows: Sequence[Row], shifts: Sequence[str], source: str | None = None) -> dict[str, Any]:
    """Of the accuracies ``a[s][d]`` after stage ``s`` on domain ``d``; stage 0 is the source, ``t`` the ``t``-th shift.

    ``tda`` (adaptation): ``a[d][d]``. ``tdg`` (generalisation): mean of ``a[s][d]`` over the stages ``s < d``. ``fa``
    (forgetting alleviation): mean over ``s > d``, of the source as well. The terms are those of RaTP (Liu et al., ICLR
    2023) and CoDAG (Cho et al., ICCV 2023).

    Args:
        rows: accuracies by domain, a row a stage that is over; None where a domain has no labels.
        shifts: the sequence; source: name of the source's column, if there is one.

    Returns:
        ``tda``, ``tdg``, ``fa``: by domain; ``mean``: of each over its domains, and ``all``, the mean of these three;
        None where nothing is known yet.
    """
    out: dict[str, Any] = {"tda": {}, "tdg": {}, "fa": {}}
    for number, name in enumerate([source, *shifts]):
        if name is None:
            continue
        known = [(stage, row[name]) for stage, row in enumerate(rows) if row.get(name) is not None]
        parts = {"tda": [v for s, v in known if s == number], "tdg": [v for s, v in known if s < number],
                 "fa": [v for s, v in known if s > number]}  # fmt: skip
        for measure, values in parts.items():
            if values and not (measure == "tda" and number == 0):  # the source's own is no adaptation
                out[measure][name] = _mean(values)
    out["mean"] = {m: _mean(list(out[m].values())) for m in ("tda", "tdg", "fa")}
    three = list(out["mean"].values())
    out["mean"]["all"] = None if None in three else _mean(three)
    return out
