"""Mixup (Zhang et al., ICLR 2018), as MixMatch has it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Beta


@torch.no_grad()
def mixed(x: Tensor, y: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Each row mixed with a random other one of the batch, with a share of Beta(alpha, alpha) that is 1/2 or more.

    Args:
        x: inputs ``[B, ...]``; y: distributions ``[B, C]``; alpha: of the Beta distribution.
    """
    share = Beta(alpha, alpha).sample((len(y),)).to(y)
    share = torch.maximum(share, 1 - share)  # each row stays mostly itself
    partner = torch.randperm(len(y), device=y.device)
    wide = share.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return wide * x + (1 - wide) * x[partner], share[:, None] * y + (1 - share[:, None]) * y[partner]
