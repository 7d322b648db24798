"""Attracting and dispersing (AaD: Yang et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.ranks import of_all_ranks
from uda_sourcefree.neighbours import NeighbourMemory
from uda_sourcefree.nrc import neighbour_agreement


def dispersion(probs: Tensor) -> Tensor:
    """``mean_i sum_{m != i} p_i . p_m`` over the batches ``[B, C]`` of all processes; grows with their size."""
    sums = of_all_ranks(torch.cat([probs.sum(0), probs.square().sum()[None]]))
    total = sums.sum(0)
    return (total[:-1].square().sum() - total[-1]) / (len(sums) * len(probs))


class AaD(NeighbourMemory):
    """A target sample agrees with its neighbours, and with nobody else.

    ``-mean_i sum_{j near i} p_i . s_j + lambda * dispersion``, ``lambda = (1 + 10 p)^(-beta)`` over the progress p of
    the run, on the target alone. Backbone, bottleneck and classifier train. Start from the source's model:
    ``model.init_from``.

    Args:
        neighbours: K; beta: decay of the dispersion. Published: 5 and 5 on VisDA, 3 and 0 on Office-Home and Office-31.
        disperse: factor of lambda. The paper sums over a batch of 64: in other batches, of all processes together, the
            same strength is ``63 / (B - 1)`` of it.
    """

    settings = ("closed", "source-free")
    search_space: ClassVar[dict[str, Any]] = {"neighbours": [2, 3, 5], "beta": [0.0, 1.0, 2.0, 5.0]}

    def __init__(self, neighbours: int = 3, beta: float = 0.0, disperse: float = 1.0) -> None:
        super().__init__(neighbours)
        if min(beta, disperse) < 0:
            raise uda.UDAError("AaD: beta and disperse must not be negative.")
        self.beta, self.disperse = beta, disperse

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Attraction and dispersion."""
        probs, near = self.around(step)
        strength = self.disperse * (1 + 10 * step.progress) ** -self.beta
        return {
            "attract": neighbour_agreement(probs, self.memory.probs[near], 1.0),
            "disperse": strength * dispersion(probs),
        }
