"""Operations on batches of images that methods share."""

from __future__ import annotations

import torch
from torch import Tensor

from uda.errors import UDAError


def rotate(x: Tensor, quarters: Tensor) -> Tensor:
    """Turn each image ``[B, C, S, S]`` by ``quarters`` ``[B]`` times 90 degrees, counter-clockwise.

    Raises:
        UDAError: images that are not square.
    """
    if x.shape[-1] != x.shape[-2]:
        raise UDAError(f"Only square images keep their shape when they are turned, not {list(x.shape[1:])}.")
    k = quarters.reshape(-1, 1, 1, 1) % 4  # a quarter turn is a transposition and a flip; a half turn two flips
    x = torch.where(k % 2 == 1, x.transpose(-1, -2), x)
    x = torch.where((k == 1) | (k == 2), x.flip(-2), x)
    return torch.where((k == 2) | (k == 3), x.flip(-1), x)
