"""A task of seconds: three classes, a shifted target, and small plugins that stand in for others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from uda.data.domains import DomainData, TensorInputs
from uda.data.readers import Reader
from uda.losses import mean_entropy, soft_cross_entropy
from uda.plugin import DataNeeds, Plugin, hookimpl

CLASSES = 3


class TinyTask(Reader):
    """Noisy class templates, and an offset for each domain: ``source``, ``source2``, ..., ``target``.

    Args:
        kind: ``features`` (rows of 6 numbers) or ``images`` (1x8x8, in [0, 1]).
        sources: number of source domains.
        rows: rows a domain.
        permute: seed of a permutation of the *target's labels*, which changes nothing else; 0 for none.
    """

    def __init__(
        self,
        kind: Literal["features", "images"] = "features",
        sources: int = 1,
        rows: int = 48,
        permute: int = 0,
    ) -> None:
        self.kind, self.sources, self.rows, self.permute = kind, sources, rows, permute

    def domains(self) -> list[str]:
        """Names of the domains."""
        return ["source", *(f"source{i}" for i in range(2, self.sources + 1)), "target"]

    def read(self, domain: str) -> DomainData:
        """The domain's rows, from fixed seeds."""
        self._known(domain, "TinyTask")
        shape = (6,) if self.kind == "features" else (1, 8, 8)
        number = self.domains().index(domain)
        random = torch.Generator().manual_seed(7 + number)
        templates = torch.rand(CLASSES, *shape, generator=torch.Generator().manual_seed(3))
        offset = 0.3 * torch.rand(shape, generator=torch.Generator().manual_seed(100 + number))
        y = torch.arange(self.rows) % CLASSES
        x = 0.6 * templates[y] + offset + 0.1 * torch.rand(self.rows, *shape, generator=random)
        if domain == "target" and self.permute:
            y = y[torch.randperm(self.rows, generator=torch.Generator().manual_seed(self.permute))]
        return DomainData(domain, TensorInputs(x, self.kind), y, ["a", "b", "c"])


class NeutralPartner(Plugin):
    """Asks for the same data as a plugin that is left out, and touches them, but returns no objective."""

    def __init__(
        self,
        source: bool = True,
        target: bool = True,
        held_out: bool = False,
        views: list[str] | None = None,
        source_views: list[str] | None = None,
        class_balanced: bool = False,
        refresh: list[str] | None = None,
        refresh_every: int = 0,
    ) -> None:
        super().__init__()
        self.needs = DataNeeds(
            source, target, held_out, frozenset(views or ()), frozenset(source_views or ()), class_balanced,
            frozenset(refresh or ()), refresh_every,
        )  # fmt: skip

    @hookimpl
    def data_needs(self) -> DataNeeds:
        """As given."""
        return self.needs


class MeanGap(Plugin):
    """Squared distance of the domains' mean features: a partner for plugins that weigh objectives."""

    @hookimpl
    def align_features(self, step) -> dict[str, Tensor]:
        """The distance, and the entropy of the target predictions as a second objective."""
        gap = (step.pooled("features").float().mean(0) - step.target.features.float().mean(0)).square().sum()
        return {"gap": gap, "entropy": 0.5 * mean_entropy(step.target.logits)}


class LabelUser(Plugin):
    """Trains on the pseudo-labels of others: a partner for plugins that only label."""

    @hookimpl
    def refine_classifier(self, step) -> dict[str, Tensor]:
        """Cross-entropy of the target on its pseudo-labels; nothing without pseudo-labels."""
        pseudo = step.target.pseudo
        if pseudo is None:
            return {}
        logits = step.target.logits
        target = pseudo.soft
        if target is None:
            target = torch.nn.functional.one_hot(pseudo.y, logits.shape[1]).to(logits.dtype)
        weight = torch.ones(len(logits)) if pseudo.weight is None else pseudo.weight
        if pseudo.keep is not None:
            weight = weight * pseudo.keep.to(weight.dtype)
        return {"self_training": soft_cross_entropy(logits, target, weight.to(logits.device))}
