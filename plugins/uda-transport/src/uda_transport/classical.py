"""Classical adaptation by optimal transport, through ``ot.da``: whole samples, numpy, no training loop.

Source samples are moved onto the target (Courty et al., TPAMI 2017; Perrot et al., NeurIPS 2016; Flamary et al., 2019),
or the labels of several sources travel to the target (Redko et al., AISTATS 2019).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from uda.errors import UDAError, check_choice
from uda_transport.solvers import warn_once

#: method -> class of ``ot.da``. All but ``linear`` give plans; ``jcpot`` takes several sources.
METHODS = {
    "emd": "EMDTransport",
    "sinkhorn": "SinkhornTransport",
    "group_lasso": "SinkhornLpl1Transport",
    "group_lasso_l2": "SinkhornL1l2Transport",
    "linear": "LinearTransport",
    "mapping": "MappingTransport",
    "jcpot": "JCPOTTransport",
}
NORMS = ("median", "max", None)


@dataclass
class Transported:
    """What transport made of the samples.

    Attributes:
        sources: for each source its samples, moved onto the target, float64 ``[n_k, F]``.
        target_probs: class distribution of each target sample by the labels of the mass that it received, ``[m, C]``;
            a sample that received none has a row of zeros. None where the method has no plan.
        proportions: class shares of the target that ``jcpot`` has found ``[C]``; None for others.
    """

    sources: list[np.ndarray]
    target_probs: np.ndarray | None
    proportions: np.ndarray | None = None


def _checked(sources: Sequence[Any], labels: Sequence[Any], target: Any, method: str) -> tuple[list, list, np.ndarray]:
    check_choice("transport", "method", method, METHODS)
    sources, target = [np.asarray(x, dtype=np.float64) for x in sources], np.asarray(target, dtype=np.float64)
    labels = [np.asarray(y).astype(np.int64) for y in labels]
    if not sources or len(sources) != len(labels):
        raise UDAError(f"Transport takes the labels of each source: got {len(sources)} sources, {len(labels)} labels.")
    for name, x in [*((f"source {k}", x) for k, x in enumerate(sources)), ("target", target)]:
        if x.ndim != 2 or min(x.shape) == 0:
            raise UDAError(f"Transport takes features [samples, F]: the {name} has the shape {x.shape}.")
        if x.shape[1] != target.shape[1]:
            raise UDAError(
                f"The {name} has {x.shape[1]} features, the target {target.shape[1]}: use COOT across feature spaces."
            )
        if not np.isfinite(x).all():
            raise UDAError(f"The features of the {name} hold NaN or infinite values: clean or impute them first.")
    for k, (x, y) in enumerate(zip(sources, labels, strict=True)):
        if y.shape != (len(x),) or y.min() < 0:
            raise UDAError(f"Source {k} needs one class id from 0 up for each of its {len(x)} samples.")
    if method == "jcpot" and len({tuple(np.unique(y)) for y in labels}) > 1:
        raise UDAError("jcpot needs samples of the same classes in each source: leave out the others.")
    return sources, labels, target


def transport(
    sources: Sequence[Any],
    labels: Sequence[Any],
    target: Any,
    method: str = "emd",
    reg: float = 0.05,
    reg_class: float = 0.1,
    norm: str | None = "median",
    classes: int | None = None,
    **options: Any,
) -> Transported:
    """Move labelled source samples onto an unlabelled target.

    Several sources are moved together as one, except by ``jcpot``, which finds the target's class shares by a common
    plan a source.

    Args:
        sources: one array ``[n_k, F]`` a source; labels: their class ids ``[n_k]``.
        target: ``[m, F]``.
        method: ``emd`` (exact), ``sinkhorn`` (entropic), ``group_lasso`` and ``group_lasso_l2`` (entropic, and each
            target sample from one class: Lp-L1 and L1-L2), ``linear`` (closed form between Gaussians), ``mapping``
            (plan and linear map together), ``jcpot``.
        reg: of the entropy, in units of the normalised cost; for ``linear`` added to the covariances, as a share of
            their mean variance.
        reg_class: of the group lasso.
        norm: what the squared distances are divided by: their ``median``, their ``max``, or None for nothing.
        classes: C; None is one more than the largest label.
        options: further arguments of the ``ot.da`` class.

    Raises:
        UDAError: bad input, or a solver that fails: with what to do.
    """
    import ot.da

    sources, labels, target = _checked(sources, labels, target, method)
    if norm not in NORMS:
        raise UDAError(f"Transport divides costs by {', '.join(map(repr, NORMS))}, not by {norm!r}.")
    pooled, y = np.concatenate(sources), np.concatenate(labels)
    classes = int(y.max()) + 1 if classes is None else classes
    several = method == "jcpot"
    present, compact = np.unique(y, return_inverse=True)  # jcpot takes classes 0 to K - 1 without a gap
    ends = np.cumsum([len(x) for x in sources])[:-1]
    scale = _scale(pooled, target, norm) if several else 1.0  # and normalises no cost
    given: dict[str, Any] = {"reg_e": reg, "reg_cl": reg_class, "norm": norm, "log": several}
    if method == "linear":
        given["reg"] = reg * max(float(np.concatenate([pooled, target]).var(0).mean()), 1e-12)
    cls = getattr(ot.da, METHODS[method])
    offered = inspect.signature(cls).parameters
    if unknown := sorted(set(options) - set(offered)):
        raise UDAError(f"ot.da.{cls.__name__} has no option {unknown[0]!r}. It offers {', '.join(offered)}.")
    if method == "sinkhorn":  # POT's default solver works on logarithms: the same plan, forty times slower
        given |= {"method": "sinkhorn", "out_of_sample_map": "ferradans"}
    given = {k: v for k, v in given.items() if k in offered} | options
    adapter = cls(**given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if several:
            copies = 2 if len(sources) == 1 else 1  # POT unpacks a list of one; twice the same has the same solution
            split, ys = [x / scale for x in sources] * copies, np.split(compact, ends) * copies
            adapter.fit(Xs=split, ys=ys, Xt=target / scale)
            moved = [x * scale for x in adapter.transform(Xs=split)][: len(sources)]
        else:
            adapter.fit(Xs=pooled, ys=y, Xt=target)
            if given.get("method") == "sinkhorn" and not _moves_all(adapter.coupling_):
                adapter = cls(**given | {"method": "sinkhorn_log"}).fit(Xs=pooled, ys=y, Xt=target)
            moved = np.split(adapter.transform(Xs=pooled), ends)
    if any("converge" in str(w.message) for w in caught):
        warn_once(f"ot.da.{cls.__name__}", "Raise reg, or max_iter where it is offered.")
    if not all(np.isfinite(x).all() for x in moved):
        raise UDAError(f"Transport by {method!r} gave values that are not finite: raise reg, or normalise the cost.")
    plans = adapter.coupling_[: len(sources)] if several else getattr(adapter, "coupling_", None)
    probs = None if plans is None else _labels_of_mass(plans, labels, y, classes)
    shares = None
    if several:
        shares = np.zeros(classes)
        shares[present] = adapter.proportions_
    return Transported(moved, probs, shares)


def _moves_all(plan: np.ndarray) -> bool:
    """Whether a plan is whole: where ``exp(-cost / reg)`` underflows rows of it are zero or not finite."""
    return bool(np.isfinite(plan).all() and (plan.sum(1) > 0).all())


def _scale(source: np.ndarray, target: np.ndarray, norm: str | None) -> float:
    """Root of what squared distances shall be divided by."""
    import ot

    return 1.0 if norm is None else float(getattr(np, norm)(ot.dist(source, target)) ** 0.5) or 1.0


def _labels_of_mass(plans: Any, labels: list[np.ndarray], pooled: np.ndarray, classes: int) -> np.ndarray:
    """``p_jc = sum_i P_ij [y_i = c] / sum_i P_ij``, ``[m, C]``; the mean over plans where there are several."""
    pairs = list(zip(plans, labels, strict=True)) if isinstance(plans, list) else [(plans, pooled)]
    mass = sum(plan.T @ np.eye(classes)[y] / plan.sum() for plan, y in pairs)
    total = mass.sum(1, keepdims=True)
    return np.divide(mass, total, out=np.zeros_like(mass), where=total > 0)
