"""Labels across feature spaces: from two raw matrices to class distributions of the target, by COOT or UCOOT.

Around the solvers of :mod:`uda_transport.coot` and :mod:`uda_transport.ucoot`: checks, a scale that makes the defaults
fit any data, labels by the mass that a target sample received, a choice of epsilon and start without target labels, and
a subset where the whole would not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uda.errors import UDAError, check_choice
from uda_transport.coot import CrossPlans, coot, labelled_start, starts
from uda_transport.memory import fitting_rows
from uda_transport.scaling import Scale, checked, common_scale
from uda_transport.ucoot import ucoot

METHODS = ("coot", "ucoot")
#: Values of epsilon that a search tries, in units of the cost of the product plan.
SEARCHED = (0.02, 0.05, 0.1, 0.2)


@dataclass
class Crossed:
    """What transport says of the target.

    Attributes:
        probs: class distribution of each target sample ``[m, C]``; rows of zeros where no mass arrived.
        mass: what each target sample received, relative to its share: 1 in COOT ``[m]``.
        plans: between ``source_rows`` ``[n']`` and ``target_rows`` ``[m']`` (all rows, if all fitted).
        source_scale, target_scale: into the units of the solver.
        epsilon: of the samples' plan; agreement: of the labels with their neighbours', see :func:`agreement`.
        tried: ``epsilon``, ``start``, ``objective``, ``agreement``, ``converged`` of each solution that was looked at.
    """

    probs: np.ndarray
    mass: np.ndarray
    plans: CrossPlans
    source_rows: np.ndarray
    target_rows: np.ndarray
    source_scale: Scale
    target_scale: Scale
    epsilon: float
    agreement: float
    tried: list[dict[str, Any]] = field(default_factory=list)


def label_prior(labels: np.ndarray, known: np.ndarray, cost: float) -> np.ndarray | None:
    """``M_ij = cost`` where target sample j has a known label (``known_j >= 0``) other than that of i, else 0."""
    if not (known >= 0).any():
        return None
    return cost * ((known[None, :] >= 0) & (labels[:, None] != known[None, :]))


def labels_of_mass(plan: np.ndarray, labels: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Class distribution ``[m, C]`` and mass ``[m]`` (relative to ``1 / m``) of what each target sample received."""
    received = plan.T @ np.eye(classes)[labels]
    total = received.sum(1)
    probs = np.divide(received, total[:, None], out=np.zeros_like(received), where=total[:, None] > 1e-12 / len(total))
    return probs, total * len(total)


def agreement(y: np.ndarray, probs: np.ndarray) -> float:
    """How far labels follow the target's own neighbourhoods, without any true label: 1 fully, 0 as chance would.

    Share of samples with the label of their nearest neighbour, corrected for chance (Cohen's kappa), times the entropy
    of the label shares over ``log C``, so that few labels for all do not win.
    """
    from sklearn.neighbors import NearestNeighbors

    label = probs.argmax(1)
    shares = np.bincount(label, minlength=probs.shape[1]) / len(label)
    chance = float((shares**2).sum())
    if chance >= 1 or len(y) < 2:
        return 0.0
    other = NearestNeighbors(n_neighbors=2).fit(y).kneighbors(return_distance=False, n_neighbors=1)[:, 0]
    kappa = (float((label == label[other]).mean()) - chance) / (1 - chance)
    entropy = -float((shares[shares > 0] * np.log(shares[shares > 0])).sum())
    return kappa * entropy / np.log(probs.shape[1])


def _subset(size: int, most: int, first: np.ndarray | None, labels: np.ndarray | None, seed: int) -> np.ndarray:
    """At most ``most`` rows: those of ``first`` in any case, and equal shares of each class where labels are known."""
    if size <= most:
        return np.arange(size)
    order = np.random.default_rng(seed).permutation(size)
    rank = np.empty(size)
    rank[order] = np.arange(size)
    if labels is not None:
        for c in np.unique(labels):
            rows = np.flatnonzero(labels == c)
            rank[rows] = np.argsort(np.argsort(rank[rows])) / len(rows)
    if first is not None:
        rank[first] = -1
    return np.sort(np.argsort(rank, kind="stable")[:most])


def _extend(y: np.ndarray, rows: np.ndarray, values: np.ndarray, neighbours: int = 5) -> np.ndarray:
    """Values of all rows of ``y``: the mean over the nearest of the rows that have them."""
    from sklearn.neighbors import NearestNeighbors

    out = np.empty((len(y), values.shape[1]))
    rest = np.setdiff1d(np.arange(len(y)), rows)
    out[rows] = values
    if len(rest):
        near = NearestNeighbors(n_neighbors=min(neighbours, len(rows))).fit(y[rows])
        out[rest] = values[near.kneighbors(y[rest], return_distance=False)].mean(1)
    return out


def cross(
    x: Any,
    y: Any,
    labels: Any,
    classes: int,
    known: Any = None,
    method: str = "coot",
    epsilon: float | None = 0.1,
    epsilon_features: float | None = None,
    reg_marginals: float | Sequence[float] = 1.0,
    label_cost: float = 2.0,
    normalise: str = "zscore",
    number_of_starts: int = 1,
    max_samples: int | None = None,
    max_iter: int = 50,
    start: CrossPlans | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Crossed:
    """Label the target ``y`` ``[m, e]`` by the source ``x`` ``[n, d]`` with ``labels`` ``[n]``, by transport.

    All costs are in units of what the product plan costs. Rows beyond ``max_samples`` a domain, or beyond what fits
    into memory, are left out of the plan; the labels of such target rows are those of their 5 nearest neighbours.

    Args:
        x, y: features; labels: class ids from 0 to ``classes - 1``.
        known: class ids of labelled target samples, -1 for the others ``[m]``.
        method: ``coot`` or ``ucoot``.
        epsilon: of the samples' plan; None tries :data:`SEARCHED` and takes the one with
            the best :func:`agreement`. 0 is exact transport, for ``coot`` only.
        epsilon_features: of the features' plan; None is 0 (exact) for ``coot``, 0.005 for ``ucoot``.
        reg_marginals: rho of source and target side in ``ucoot``.
        label_cost: of matching a labelled target sample with a source sample of another class.
        normalise: see :func:`common_scale`.
        number_of_starts: of the descent; the lowest objective wins. See :func:`~uda_transport.coot.starts`; with
            labelled target samples the first is :func:`~uda_transport.coot.labelled_start`.
        max_samples: most rows a domain in a plan; None is as many as fit.
        max_iter: rounds.
        start: an earlier result for the same rows, to go on from (it replaces the starts).
        seed: of the subset and of random starts.
        device: where entropic plans are solved: numpy in float64 on ``cpu``, else torch in float32.

    Raises:
        UDAError: bad input, or plans that break down; with what to do.
    """
    check_choice("transport across spaces", "method", method, METHODS)
    labels = np.asarray(labels).astype(np.int64)
    x, y = checked("source", x, len(np.unique(labels))), checked("target", y, classes)
    if labels.shape != (len(x),) or labels.min() < 0 or labels.max() >= classes:
        raise UDAError(f"The source needs one class id from 0 to {classes - 1} for each of its {len(x)} samples.")
    if epsilon_features is None:
        epsilon_features = 0.0 if method == "coot" else 0.005
    known = np.full(len(y), -1) if known is None else np.asarray(known).astype(np.int64)
    if known.shape != (len(y),) or known.max() >= classes:
        raise UDAError(f"Known target labels are class ids below {classes}, or -1, for each of {len(y)} samples.")
    most = fitting_rows(x.shape, y.shape, max_samples, device)
    rows = _subset(len(x), most, None, labels, seed)
    cols = _subset(len(y), most, np.flatnonzero(known >= 0), None, seed)
    sx, sy = common_scale(x, y, normalise)
    a, b = sx.apply(x[rows]), sy.apply(y)
    prior = label_prior(labels[rows], known[cols], label_cost)
    arrays = [a, b[cols], prior]
    if device != "cpu":
        import torch

        arrays = [None if v is None else torch.as_tensor(v, dtype=torch.float32, device=device) for v in arrays]
    first = [None] if start is not None else starts(a, b[cols], number_of_starts, seed)
    if start is None and prior is not None:
        first[0] = labelled_start(a, b[cols], labels[rows], known[cols])
    rho = tuple(np.broadcast_to(np.asarray(reg_marginals, dtype=float), 2).tolist())
    tried, best = [], None
    for eps in SEARCHED if epsilon is None else (epsilon,):
        solved = []
        for features in first:
            given = features if features is None or device == "cpu" else arrays[0].new_tensor(features)
            common = {"prior": arrays[2], "features": given, "start": start, "max_iter": max_iter}
            if method == "coot":
                plans = coot(arrays[0], arrays[1], (eps, epsilon_features), **common)
            else:
                plans = ucoot(arrays[0], arrays[1], rho, (eps, epsilon_features), **common)
            solved.append(plans)
        number = int(np.argmin([p.objective for p in solved]))
        sample_plan = _numpy(solved[number].samples)
        probs, mass = labels_of_mass(sample_plan, labels[rows], classes)
        agrees = agreement(b[cols], probs)
        tried += [
            {"epsilon": eps, "start": k, "objective": p.objective, "converged": p.converged}
            | ({"agreement": agrees} if k == number else {})
            for k, p in enumerate(solved)
        ]
        if best is None or agrees > best[0]:
            best = (agrees, eps, solved[number], probs, mass)
    agrees, eps, plans, probs, mass = best
    whole = _extend(b, cols, np.concatenate([probs, mass[:, None]], 1))
    probs, mass = whole[:, :-1], whole[:, -1]
    probs[known >= 0] = np.eye(classes)[known[known >= 0]]
    return Crossed(probs, mass, plans, rows, cols, sx, sy, eps, agrees, tried)


def _numpy(array: Any) -> np.ndarray:
    return array.detach().cpu().double().numpy() if hasattr(array, "detach") else array
