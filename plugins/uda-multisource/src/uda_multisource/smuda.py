"""Secure Domain Adaptation with Multiple Sources (SMUDA: Stan and Rostami, TMLR 2022)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from uda_transport.sliced import sliced_wasserstein

import uda
from uda.errors import check_choice
from uda.losses import mean_entropy
from uda.nn import full, no_autocast
from uda_multisource.experts import Experts


def gaussian_factors(covariances: Tensor, ridge: float = 1e-4) -> Tensor:
    """Lower triangular factors ``[C, F, F]`` of ``S + ridge * (tr S / F + 1e-6) I``: of few samples S has no full rank.

    Args:
        covariances: S, ``[C, F, F]``.
    """
    s = covariances.double()
    scale = s.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0) + 1e-6
    return torch.linalg.cholesky(s + ridge * torch.diag_embed(scale[:, None].expand(-1, s.shape[1]))).float()


def class_draws(means: Tensor, factors: Tensor, n: int) -> Tensor:
    """``n`` samples ``[n, F]`` of the classes' Gaussians, each class as often as the others within one."""
    classes = (torch.arange(n, device=means.device) + torch.randint(len(means), ()).item()) % len(means)
    noise = torch.randn(n, means.shape[1], device=means.device)
    return means[classes] + torch.einsum("nfg,ng->nf", factors[classes], noise)


class SMUDA(Experts):
    """Each source model by itself: the target's features become like samples of the classes' Gaussians.

    For each expert i, ``weight * SW(g_i(x_t), Gaussians_i) + entropy * mean H(p_i)``, with the sliced Wasserstein
    distance to samples that are drawn anew in each step, all classes alike (Stan and Rostami 2022). What is needed of a
    source is a file of ``uda export-source --statistics``: its model, and a mean and covariance for each class.
    Classifiers are frozen. The target takes the experts' mean vote, or one by confidence.

    Args:
        checkpoints: the hand-over files of the sources, two or more; inputs, architectures: as in
            :class:`~uda_multisource.experts.Experts`.
        weight: of the distance.
        entropy: published 0.02 (Office-31, Office-Caltech) and 1 (Office-Home, DomainNet).
        projections: random directions, 200 published.
        votes: ``even``, or ``confident``: weights by the share of the target that an expert says with more than
            ``threshold``, made anew at the start of each epoch.
        threshold: see ``votes``.
        ridge: added to the covariances, relative to their mean variance.
    """

    mix = "probs"
    freeze_mixture = True
    search_space: ClassVar[dict[str, Any]] = {"entropy": (0.003, 1.0, "log"), "weight": (0.1, 10.0, "log")}

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None = None,
        architectures: list[dict[str, Any]] | None = None,
        weight: float = 1.0,
        entropy: float = 0.02,
        projections: int = 200,
        votes: str = "even",
        threshold: float = 0.9,
        ridge: float = 1e-4,
    ) -> None:
        super().__init__(checkpoints, inputs, architectures)
        check_choice("SMUDA", "votes", votes, ("even", "confident"))
        if min(weight, entropy) < 0 or projections < 1 or ridge <= 0 or not 0 <= threshold < 1:
            raise uda.UDAError("SMUDA: weights not negative, projections from 1, ridge positive, threshold in [0, 1).")
        self.weight, self.entropy, self.projections = weight, entropy, projections
        self.votes, self.threshold, self.ridge = votes, threshold, ridge

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone; whole where the votes are weighed."""
        return uda.DataNeeds(source=False, refresh={"target"} if self.votes == "confident" else ())

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The experts, and their classes' Gaussians.

        Raises:
            UDAError: a file without class statistics.
        """
        super().build(model)
        if "means_0" in self._buffers:
            return
        for i, width in enumerate(model.head.widths):
            means, factors = torch.zeros(model.num_classes, width), torch.zeros(model.num_classes, width, width)
            if self.statistics:
                found = self.statistics[i]
                if found is None:
                    raise uda.UDAError(
                        f"SMUDA: {self.checkpoints[i]!r} holds no class statistics. Make it by "
                        "`uda export-source CKPT --statistics` where the source is."
                    )
                for name, own in (("means", means), ("covariances", factors)):
                    given = found.get(name)
                    if given is None or given.shape != own.shape or not bool(given.isfinite().all()):
                        raise uda.UDAError(
                            f"SMUDA: the class statistics in {self.checkpoints[i]!r} do not fit: {name} must be "
                            f"{list(own.shape)} and finite. Make them anew by `uda export-source CKPT --statistics`."
                        )
                means, factors = found["means"], gaussian_factors(found["covariances"], self.ridge)
            self.register_buffer(f"means_{i}", means)
            self.register_buffer(f"factors_{i}", factors)

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Votes by confidence."""
        if self.votes == "confident":
            score = full(model.head.each(bank.target.features)).softmax(2).amax(2)
            share = (score > self.threshold).float().mean(0).clamp_min(1e-3)
            model.head.mixture.copy_(share.log())

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Distance and entropy of each expert, summed."""
        head, features = step.model.head, step.target.features
        distances, entropies = [], []
        for i, (f, z) in enumerate(
            zip(features.split(head.widths, 1), head.each(features).unbind(1), strict=True)
        ):
            with no_autocast(f):
                directions = F.normalize(torch.randn(f.shape[1], self.projections, device=f.device), dim=0)
                drawn = class_draws(getattr(self, f"means_{i}"), getattr(self, f"factors_{i}"), len(f))
                distances.append(sliced_wasserstein(drawn, full(f), directions))
            entropies.append(mean_entropy(z))
        return {"distance": self.weight * sum(distances), "entropy": self.entropy * sum(entropies)}
