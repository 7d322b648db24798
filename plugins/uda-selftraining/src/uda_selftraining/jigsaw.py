"""Jigsaw puzzles as a self-supervised side task (Carlucci et al., CVPR 2019; Bucci et al., TPAMI 2021)."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda_selftraining.auxiliary import SideTask


def permutation_set(tiles: int, count: int, seed: int = 0) -> Tensor:
    """``count + 1`` orders of ``tiles`` tiles that differ much from each other; the first is the identity.

    Greedy as in Noroozi & Favaro (ECCV 2016): each new order has the largest Hamming distance to the nearest one
    chosen so far (ties: the largest sum of distances). Candidates are all orders of up to 6 tiles, else 5000 random
    ones from ``seed`` alone, so that all processes and runs have the same puzzles.

    Returns:
        int64 ``[count + 1, tiles]``.

    Raises:
        UDAError: more orders than there are.
    """
    if count < 1 or count >= math.factorial(tiles):
        raise uda.UDAError(f"{tiles} tiles have {math.factorial(tiles) - 1} orders beside their own, not {count}.")
    if tiles <= 6:
        pool = torch.tensor(list(itertools.permutations(range(tiles))))[1:]
    else:
        random = torch.Generator().manual_seed(seed)
        pool = torch.rand(max(5000, 4 * count), tiles, generator=random).argsort(1).unique(dim=0)
    chosen = [torch.arange(tiles)]
    nearest = total = None
    for _ in range(count):
        distance = (pool != chosen[-1]).sum(1)
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        total = distance if total is None else total + distance
        best = (nearest * (tiles * (count + 1) + 1) + total).argmax()
        if nearest[best] == 0:
            raise uda.UDAError(f"Only {len(chosen) - 1} of {count} orders of {tiles} tiles found: ask for fewer.")
        chosen.append(pool[best])
    return torch.stack(chosen)


def shuffle_tiles(x: Tensor, orders: Tensor, grid: int) -> Tensor:
    """Cut images into ``grid`` x ``grid`` tiles and put tile ``orders[i, p]`` of image i at place p (row by row).

    Where a side is no multiple of ``grid``, the largest centred part that is one is used, and brought back to size.

    Args:
        x: ``[B, C, H, W]``; orders: ``[B, grid * grid]``.
    """
    batch, channels, height, width = x.shape
    h, w = height // grid, width // grid
    top, left = (height - h * grid) // 2, (width - w * grid) // 2
    tiles = x[:, :, top : top + h * grid, left : left + w * grid].reshape(batch, channels, grid, h, grid, w)
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, grid * grid, C, h, w]
    tiles = tiles[torch.arange(batch, device=x.device)[:, None], orders]
    tiles = tiles.unflatten(1, (grid, grid)).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, h * grid, w * grid)
    if tiles.shape != x.shape:
        tiles = F.interpolate(tiles, (height, width), mode="bilinear", align_corners=False)
    return tiles


class Jigsaw(SideTask):
    """Tell in which of P orders the tiles of an image were put, on source and target (Bucci et al. 2021).

    ``source_weight * CE(j(f(shuffled source)), p) + target_weight * CE(j(f(shuffled target)), p)`` with p in 0..P, 0
    for tiles in place, and one linear head j for both domains. Images are shuffled as a whole and seen by the backbone
    as images (Carlucci et al. 2019), not tile by tile. Needs no class label.

    Args:
        source_weight: of the source's objective.
        target_weight: of the target's objective.
        grid: tiles along a side (3).
        permutations: orders P beside the right one (30).
        untouched: share of the images whose tiles stay in place; None: 1 / (P + 1).
        lr_scale: learning rate of the head relative to the other new layers.
    """

    task: ClassVar[str] = "jigsaw"
    search_space: ClassVar[dict[str, Any]] = {**SideTask.search_space, "permutations": [10, 30, 100]}

    def __init__(
        self,
        source_weight: float = 0.5,
        target_weight: float = 0.5,
        grid: int = 3,
        permutations: int = 30,
        untouched: float | None = None,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(source_weight, target_weight, untouched, lr_scale)
        if not 2 <= grid <= 8:
            raise uda.UDAError(f"Jigsaw: grid is the number of tiles along a side, 2 to 8, not {grid}.")
        self.grid, self.permutations = grid, permutations
        self.register_buffer("orders", permutation_set(grid * grid, permutations))

    def num_labels(self) -> int:
        """The orders, the right one included."""
        return self.permutations + 1

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """At least one pixel a tile."""
        if min(shape[1:]) < self.grid:
            raise uda.UDAError(f"Jigsaw: images of {shape[1]}x{shape[2]} have no {self.grid}x{self.grid} tiles.")

    def change(self, x: Tensor, label: Tensor) -> Tensor:
        """Shuffled images."""
        return shuffle_tiles(x, self.orders[label], self.grid)
