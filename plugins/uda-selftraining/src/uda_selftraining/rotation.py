"""Rotation as a self-supervised side task (Bucci et al., TPAMI 2021; Gidaris et al., ICLR 2018)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

import uda
from uda.images import rotate
from uda_selftraining.auxiliary import SideTask


class Rotation(SideTask):
    """Tell by how many quarter turns an image was turned, on source and target (Bucci et al. 2021).

    ``source_weight * CE(r(f(turned source)), k) + target_weight * CE(r(f(turned target)), k)``, k in 0..3, with one
    linear head r for both domains. Needs no class label, so that label sets may differ between the domains.

    Args:
        source_weight: of the source's objective.
        target_weight: of the target's objective.
        untouched: share of the images that are not turned; None: a quarter.
        lr_scale: learning rate of the head relative to the other new layers.
    """

    task: ClassVar[str] = "rotation"

    def __init__(
        self,
        source_weight: float = 0.5,
        target_weight: float = 0.5,
        untouched: float | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(source_weight, target_weight, untouched, lr_scale)

    def num_labels(self) -> int:
        """0, 90, 180 and 270 degrees."""
        return 4

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Square images only."""
        if shape[1] != shape[2]:
            raise uda.UDAError(f"Rotation turns square images, not {shape[1]}x{shape[2]}: crop them in data.views.")

    def change(self, x: Tensor, label: Tensor) -> Tensor:
        """Turned images."""
        return rotate(x, label)
