"""What gradient combiners share: the Gram matrix of the objectives in, a weight for each objective out."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

import uda
from uda.errors import check_choice

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
LEVELS = ("features", "bottleneck", "parameters")
#: Settings in which several objectives meet on a shared net.
SETTINGS = ("closed", "partial", "open", "universal", "multi-source", "source-free", "heterogeneous", "semi-supervised")


def check_level(name: str, level: str | None) -> None:
    """Refuse an unknown level of inner products.

    Raises:
        UDAError: naming the nearest level.
    """
    if level is not None:
        check_choice(name, "level", level, LEVELS)


def moving(gram: Matrix) -> NDArray[np.bool_]:
    """Objectives ``[K]`` that pull at the shared part at all.

    A gradient of zero (a reversal that starts at zero, an objective on private parts only) would be a perfect common
    descent direction for a min-norm solver and take all of the weight: combiners leave such objectives out.
    """
    size = gram.diagonal()
    return size > 1e-20 * max(size.max(initial=0.0), 1e-30)


def in_full(weights: Vector, live: NDArray[np.bool_]) -> Vector:
    """Weights of the objectives in ``live``, and 1 for the others."""
    out = np.ones(len(live))
    out[live] = weights
    return out


class Combiner(uda.Plugin):
    """Weights as a function of the Gram matrix ``M = G G^T`` ``[K, K]`` of the objectives' gradients.

    A subclass fills :meth:`solve`. Weights apply to backbone and bottleneck; heads and discriminators keep their plain
    gradients. A step whose gradients are not finite (an overflow in half precision) takes the plain sum.

    Args:
        level: where gradients are compared: ``features`` (cheapest; objectives on different samples never conflict
            there), ``bottleneck`` or ``parameters`` (of backbone and bottleneck); None: ``model.gate_level``.
        keep_scale: multiply weights that sum to 1 by the number of objectives K, so that equal weights are the plain
            sum and a learning rate keeps its meaning; False: the paper's length.
    """

    settings = SETTINGS
    search_space: ClassVar[dict[str, Any]] = {"level": list(LEVELS)}

    def __init__(self, level: str | None = None, keep_scale: bool = True) -> None:
        super().__init__()
        check_level(type(self).__name__, level)
        self.level, self.keep_scale = level, keep_scale

    @abstractmethod
    def solve(self, gram: Matrix, losses: Vector, step: uda.Step) -> Vector:
        """Weights ``[K]`` from inner products ``[K, K]`` (float64, no zero rows) and values of the objectives ``[K]``.

        Must give the same on all ranks: ``gram`` is equal there already, and so are ``losses``.
        """

    def values(self, objectives: uda.Objectives) -> Vector:
        """Values ``[K]`` of the objectives where a method asks for them; zeros here, which need no exchange."""
        return np.zeros(len(objectives))

    @uda.hookimpl
    def weigh_objectives(self, step: uda.Step, objectives: uda.Objectives) -> dict[str, float] | None:
        """A weight for each objective, or None where a gradient is not finite."""
        gram = objectives.gram(self.level).double().cpu().numpy()
        losses = self.values(objectives)
        if not (np.isfinite(gram).all() and np.isfinite(losses).all()):
            return None
        live = moving(gram)
        weights = np.ones(live.sum())
        if live.sum() > 1:
            weights = self.solve(gram[np.ix_(live, live)], losses[live], step)
        return dict(zip(objectives, in_full(weights, live).tolist(), strict=True))
