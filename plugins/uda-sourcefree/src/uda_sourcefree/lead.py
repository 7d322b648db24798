"""Learning decomposition (LEAD: Qu et al., CVPR 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.losses import classification_loss
from uda.nn import full, no_autocast
from uda.nn.heads import class_vectors
from uda_sourcefree.universal import UniversalNeighbours


@torch.no_grad()
def known_basis(vectors: Tensor) -> Tensor:
    """Orthonormal basis ``[C, F]`` of the span of class vectors ``[C, F]``: left singular vectors of ``W^T``."""
    with no_autocast(vectors):
        return torch.linalg.svd(full(vectors).T, full_matrices=False).U.T.contiguous()


def parts(features: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths ``[B]`` of the source-known and the source-unknown part of features ``[B, F]``."""
    with no_autocast(features):
        f = full(features)
        along = f @ basis.T
        across = f - along @ basis
        return (along.square().sum(1) + 1e-12).sqrt(), (across.square().sum(1) + 1e-12).sqrt()


@torch.no_grad()
def two_means(u: Tensor) -> tuple[float, float]:
    """Means, the smaller first, of a mixture of two Gaussians on numbers ``[N]``, started at the quartiles."""
    from sklearn.mixture import GaussianMixture

    x = u.double().cpu().numpy()[:, None]
    if np.ptp(x) < 1e-9:  # nothing to take apart
        return (float(x.mean()),) * 2
    start = np.quantile(x, [0.25, 0.75])[:, None]
    found = GaussianMixture(2, means_init=start, max_iter=200, random_state=0).fit(x)
    low, high = sorted(found.means_[:, 0].tolist())
    return low, high


@torch.no_grad()
def decide(
    features: Tensor, probs: Tensor, vectors: Tensor, clusters: int, basis: Tensor, alpha: float = 1e-4
) -> tuple[Tensor, Tensor, Tensor]:
    """Class, unknown mask and weight of each sample of a whole target.

    ``s_ic = sqrt((1 - exp(-max(cos(f_i, t_c), 0))) * exp(max(cos(f_i, w_c), 0) - 1))`` with target prototype ``t_c``
    (mean over the ``N / clusters`` samples of largest probability) and class vector ``w_c``. The class is
    ``y = argmax_c s_ic``. With ``u`` the length of the source-unknown part, ``b_c`` its mean over those samples and
    ``mu_2`` the larger mean of :func:`two_means`, a sample is unknown from ``b_y + s_iy max(mu_2 - b_y, 0)`` on. Its
    weight is ``1 - (1 + (u - threshold)^2 / alpha)^(-(alpha + 1) / 2)``: small near the threshold.

    Args:
        features: ``[N, F]`` of length 1; probs: ``[N, C]``; vectors: ``[C, F]``; basis: of :func:`known_basis`.
    """
    with no_autocast(features):
        number = max(1, len(probs) // clusters)
        top = probs.argsort(dim=0, descending=True, stable=True)[:number]  # [T, C]
        u = parts(features, basis)[1]
        prototypes = F.normalize(features[top].mean(0), dim=1)
        to_target = (features @ prototypes.T).clamp_min(0)
        to_source = (features @ F.normalize(full(vectors), dim=1).T).clamp_min(0)
        common = ((1 - (-to_target).exp()) * (to_source - 1).exp()).sqrt()
        score, label = common.max(1)
        base = u[top].mean(0)[label]
        threshold = base + score * (two_means(u)[1] - base).clamp_min(0)
        weight = 1 - (1 + (u - threshold).square() / alpha) ** (-(alpha + 1) / 2)
    return label, u >= threshold, weight


class LEAD(UniversalNeighbours):
    """Takes features apart into what the source's classifier sees and what it does not; the second part tells unknown.

    ``label_weight * mean w CE(y^, p) + split_weight * mean w CE(known or unknown, softmax(|known|, |unknown|)) +
    neighbour_weight * CE(mean of K neighbours' p, p)`` on the target alone; labels and weights w of :func:`decide` at
    the start of each epoch, uniform where unknown. The classifier is frozen. Other plugins find the weights in
    ``step.target.pseudo.weight``. Needs more features than classes. Start from the source's model: ``model.init_from``.

    Args:
        label_weight: published: 0.3 on Office-31, 1 on VisDA, 2 on Office-Home and DomainNet.
        neighbour_weight, split_weight: 1 in all published runs; neighbours: K, published: 4.
        alpha: of the weights; published: 1e-4. Inf-like values make them small everywhere.
        recount: epochs between two counts of the target's clusters; published: 10.
        target_classes: clusters of the target, where they are known; None: by the silhouette.
        shares: candidates for their number, as shares of the source's classes.
        tsne: count clusters on a t-SNE map, as published; False: on the features, in a tenth of the time, but worse.
        threshold: unknown above this entropy of the softmax over ``log C``; published: 0.55.
    """

    search_space: ClassVar[dict[str, Any]] = {"label_weight": (0.1, 2.0, "log"), "alpha": [1e-4, 1e-3, 1e-2]}
    basis: Tensor

    def __init__(
        self,
        label_weight: float = 0.3,
        neighbour_weight: float = 1.0,
        split_weight: float = 1.0,
        neighbours: int = 4,
        alpha: float = 1e-4,
        recount: int = 10,
        target_classes: int | None = None,
        shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0),
        tsne: bool = True,
        threshold: float = 0.55,
    ) -> None:
        super().__init__(label_weight, neighbour_weight, neighbours, target_classes, shares, tsne, threshold)
        if split_weight < 0 or alpha <= 0 or recount < 1:
            raise uda.UDAError("LEAD: split_weight must not be negative, alpha positive, and recount 1 or more.")
        self.split_weight, self.alpha, self.recount = split_weight, alpha, recount

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """As its base, and room for the known space.

        Raises:
            UDAError: no more features than classes, so that no unknown space is left.
        """
        super().build(model)
        class_vectors(model.head, "LEAD")
        if model.feature_dim <= model.num_classes:
            raise uda.UDAError(
                f"LEAD: {model.feature_dim} features and {model.num_classes} classes leave no space that the "
                "source does not know: use a wider bottleneck (model.bottleneck)."
            )
        if "basis" not in self._buffers:
            self.register_buffer("basis", torch.zeros(model.num_classes, model.feature_dim))

    def due(self, model: uda.UDA) -> bool:
        """At the start, and after each ``recount`` epochs."""
        return int(self.clusters) == 0 or model.trainer.current_epoch % self.recount == 0

    def labelled(self, model: uda.UDA, features: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By decomposition."""
        vectors = model.head.weight_vectors.detach()
        if not bool(self.basis.any()):  # the classifier is frozen: once
            self.basis.copy_(known_basis(vectors))
        return decide(features, probs, vectors, int(self.clusters), self.basis, self.alpha)

    def objectives(self, step: uda.Step, near: Tensor) -> dict[str, Tensor]:
        """As its base, and the split of the features."""
        out = super().objectives(step, near)
        if self.split_weight:
            index = step.target.index
            with no_autocast(step.target.features):
                lengths = torch.stack(parts(F.normalize(full(step.target.features), dim=1), self.basis), 1)
            unknown = self.soft[index].max(1).values < 1.0
            out["split"] = self.split_weight * classification_loss(lengths, unknown.long(), weight=self.weight[index])
        return out
