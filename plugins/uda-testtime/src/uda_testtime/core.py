"""Core: statistics mixed with the source's, and less confusion between classes."""

from __future__ import annotations

from torch import Tensor

from uda.losses import minimum_class_confusion
from uda_testtime.adapter import Adapter
from uda_testtime.methods import TENT


class Core(TENT):
    """alpha-BN with an update on the correlation of classes (You et al., 2021).

    The loss is that of minimum class confusion (Jin et al., 2020): the paper's own form of its pairwise correlation was
    not at hand, so this is its idea and no copy. Scored: the logits before the update.

    Args:
        lr, optimizer, weight: as in :class:`TENT`.
        source_weight: share of the **source's** statistics, the paper's alpha.
        temperature: of the confusion.
    """

    def __init__(
        self, lr: float = 1e-3, optimizer: str = "adam", weight: float = 1.0, source_weight: float = 0.9,
        temperature: float = 2.5,
    ) -> None:  # fmt: skip
        super().__init__(lr, optimizer, weight, source_weight)
        self.temperature = temperature

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Logits, then one step."""
        logits = a.net(x)
        a.update(self.weight * minimum_class_confusion(logits, self.temperature))
        return logits
