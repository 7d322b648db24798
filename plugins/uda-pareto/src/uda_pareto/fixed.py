"""Fixed weights by name: the baseline that gradient combiners have to beat."""

from __future__ import annotations

import uda
from uda_pareto.combiner import SETTINGS


def check_names(model: uda.UDA, names: list[str], owner: str) -> None:
    """Refuse names of objectives whose plugin is not there, before training starts.

    Args:
        names: ``classification`` or ``<key>/<objective>``; whether the plugin of that key has the objective is known
            in the first step only.

    Raises:
        UDAError: naming what there is.
    """
    for name in names:
        if name != "classification" and name.split("/")[0] not in model.plugins:
            known = ", ".join(["classification", *(f"{k}/..." for k in model.plugins if k != owner)])
            raise uda.UDAError(f"Plugin {owner!r}: there is no objective {name!r}. Objectives are {known}.")


class FixedWeights(uda.Plugin):
    """Weights on the shared part by name of objective; what is not named weighs 1.

    Other than the ``weight`` of a method, these leave heads and discriminators at their full rate.

    Args:
        weights: weight by name, such as ``{classification: 1.0, align/domain: 0.3}``. The names are those of the
            training curves: ``classification``, ``<key>/<objective>``.
    """

    settings = SETTINGS

    def __init__(self, weights: dict[str, float] | None = None) -> None:
        super().__init__()
        self.weights = {str(k): float(v) for k, v in (weights or {}).items()}
        if wrong := [k for k, v in self.weights.items() if not 0 <= v < float("inf")]:
            raise uda.UDAError(f"FixedWeights: the weight of {wrong[0]!r} must be a number of 0 or more.")

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Check the names."""
        check_names(model, list(self.weights), self.key)

    @uda.hookimpl
    def weigh_objectives(self) -> dict[str, float]:
        """The weights as they are."""
        return self.weights
