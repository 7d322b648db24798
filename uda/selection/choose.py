"""Which validation, or run, the scores choose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError, nearest
from uda.selection.registry import SCORES

#: scores of different families, that ``vote`` takes where they were computed
VOTERS = ("im", "corrc", "snd", "dev", "class_cluster")


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks ``[n]`` from 0 (smallest) to n - 1, equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return rankdata(np.asarray(values, dtype=np.float64)) - 1


def vote(scores: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Mean rank of each candidate over several scores, in ``[0, 1]``; larger is better (Borda's count).

    Args:
        scores: by name, the value of each of the ``n`` candidates (validations or runs), larger is better. A
            value
            that is not finite ranks last.
    """
    lengths = {len(v) for v in scores.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise UDAError(f"A vote needs as many values of each score as there are candidates, got {sorted(lengths)}.")
    table = [np.nan_to_num(np.asarray(v, np.float64), nan=-np.inf, posinf=-np.inf) for v in scores.values()]
    return np.mean([ranks(row) for row in table], axis=0) / max(1, lengths.pop() - 1)


def needed_scores(by: str | Sequence[str], source: bool = True) -> list[str]:
    """Scores that have to be computed so that ``by`` can choose; a vote without ``source`` has fewer voters.

    Raises:
        UDAError: a score that does not exist, with the nearest names.
    """
    if by == "vote":
        return [n for n in VOTERS if source or not SCORES[n].needs_source]
    names = [by] if isinstance(by, str) else list(by)
    for name in names:
        if name not in SCORES:
            known = [*SCORES, "vote"]
            raise UDAError(f"select_by: unknown label-free score {name!r}. {nearest(name, known)}")
    return names


def _finite(row: Mapping[str, Any], name: str) -> bool:
    return math.isfinite(row.get(f"select/{name}", math.nan))


def _names(history: Sequence[Mapping[str, Any]], by: str | Sequence[str]) -> list[str]:
    names = [by] if isinstance(by, str) and by != "vote" else list(VOTERS if by == "vote" else by)
    found = [n for n in names if any(_finite(row, n) for row in history)]
    if by == "vote":
        return found
    return names if len(found) == len(names) else []


def _preference(rows: Sequence[Mapping[str, Any]], names: list[str]) -> np.ndarray:
    table = {n: [float(r.get(f"select/{n}", math.nan)) for r in rows] for n in names}
    if len(names) == 1:
        only = np.asarray(table[names[0]])
        return np.where(np.isfinite(only), only, -np.inf)
    return vote(table)


def select_epoch(history: Sequence[Mapping[str, Any]], by: str | Sequence[str] = DEFAULT_SCORE) -> int | None:
    """Position in ``history`` of the validation to take, or None where there is none.

    Validations that the collapse guard marked are refused, with a warning if one of them would have been
    taken. The first of equally good ones is taken.

    Args:
        history: a mapping for each validation, with ``select/<name>`` and, where the guard ran,
            ``select/collapsed`` (0 or 1).
        by: a score, several scores that vote, or ``"vote"`` for :data:`VOTERS` as far as they were computed.
    """
    names = _names(history, by)
    if not names:
        return None
    usable = [i for i, row in enumerate(history) if any(_finite(row, n) for n in names)]
    sound = [i for i in usable if not history[i].get("select/collapsed", 0)]
    if len(sound) < len(usable):
        first = usable[int(np.argmax(_preference([history[i] for i in usable], names)))]
        if first not in sound:
            told = f"epoch {history[first].get('epoch', first)} has the best {'+'.join(names)}"
            what = "it is refused" if sound else "all validations have, so none is selected"
            warnings.warn(f"The predictions have collapsed: {told}, but {what} (see docs/selection.md).", stacklevel=2)
    if not sound:
        return None
    return sound[int(np.argmax(_preference([history[i] for i in sound], names)))]


def monitor_value(history: Sequence[Mapping[str, Any]], by: str | Sequence[str] = DEFAULT_SCORE) -> float:
    """A number for the last validation, to be monitored with ``mode="max"``.

    Of a single score, its value, and ``-inf`` where the predictions have collapsed. Of a vote, the length of
    the history where the last validation wins among those so far, else ``-inf``; ranks change as validations
    come, so the checkpoint that is kept is the last one that won when it was new (:func:`running_choice`).
    """
    row, names = history[-1], _names(history, by)
    if row.get("select/collapsed", 0) or not names:
        return -math.inf
    if len(names) == 1:
        return float(row[f"select/{names[0]}"]) if _finite(row, names[0]) else -math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        won = select_epoch(history, by) == len(history) - 1
    return float(len(history)) if won else -math.inf


def running_choice(history: Sequence[Mapping[str, Any]], by: str | Sequence[str] = DEFAULT_SCORE) -> int | None:
    """Position of the validation whose checkpoint :func:`monitor_value` keeps.

    For one score it is that of :func:`select_epoch`.
    """
    values = [monitor_value(history[: i + 1], by) for i in range(len(history))]
    best = max(values, default=-math.inf)
    return values.index(best) if best > -math.inf else None
