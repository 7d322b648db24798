"""Balanced random forests: each node halves the source, and a soft way through the trees has gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.nn import full, no_autocast


def information_gain(left: Tensor, right: Tensor) -> Tensor:
    """``H(both) - n_l / n H(left) - n_r / n H(right)`` in nats, of class counts ``[..., C]`` on either side."""

    def surprise(counts: Tensor) -> Tensor:  # n H: what the classes of a side cost
        n = counts.sum(-1)
        return torch.special.entr(counts / n.clamp_min(1)[..., None]).sum(-1) * n

    both = left + right
    return (surprise(both) - surprise(left) - surprise(right)) / both.sum(-1).clamp_min(1)


def best_split(x: Tensor, y: Tensor, target: Tensor, planes: Tensor, alignment: float) -> tuple[Tensor, Tensor, Tensor]:
    """The hyperplane of a node, its threshold and the spread of the projections.

    The threshold is the median of the source, so that the halves are even; of the candidates that one is taken which
    has the largest information gain less ``alignment`` times how far the target is from an even split.

    Args:
        x: source rows of the node ``[n, F]``; y: their classes, one-hot ``[n, C]``; target: its target rows ``[m, F]``;
        planes: candidates ``[R, F]``.
    """
    projected = x @ planes.T
    ordered = projected.sort(0).values
    threshold = (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2
    right = (projected > threshold).to(y.dtype)
    score = information_gain((1 - right).T @ y, right.T @ y)
    if len(target):
        score = score - alignment * ((target @ planes.T > threshold).to(y.dtype).mean(0) - 0.5).abs()
    best = score.argmax()
    spread = projected[:, best].std(correction=0) if len(x) > 1 else torch.ones_like(threshold[best])
    return planes[best], threshold[best], spread.clamp_min(1e-6)


class BalancedForest(nn.Module):
    """Trees of fixed depth whose nodes are hyperplanes and whose leaves are class distributions; all of it buffers.

    Args:
        features: F; classes: C; trees: T; depth: D, so that a tree has 2^D leaves.
        candidates: random hyperplanes that each node chooses from, on about sqrt(F) features each.
        softness: width of the soft split relative to the spread of the node's projections.
    """

    planes: Tensor
    thresholds: Tensor
    spreads: Tensor
    leaves: Tensor

    def __init__(
        self, features: int, classes: int, trees: int = 8, depth: int = 4, candidates: int = 32, softness: float = 0.2
    ) -> None:
        super().__init__()
        self.depth, self.candidates, self.softness = depth, candidates, softness
        nodes = 2**depth - 1
        self.register_buffer("planes", torch.zeros(trees, nodes, features))
        self.register_buffer("thresholds", torch.zeros(trees, nodes))
        self.register_buffer("spreads", torch.ones(trees, nodes))
        self.register_buffer("leaves", torch.full((trees, nodes + 1, classes), 1 / classes))

    @torch.no_grad()
    def grow(self, x: Tensor, y: Tensor, target: Tensor, alignment: float = 1.0) -> None:
        """Build all trees anew, each on a bootstrap sample of the source.

        Args:
            x: ``[N, F]``; y: class ids ``[N]``; target: ``[M, F]``; alignment: as in :func:`best_split`.
        """
        trees, nodes, width = self.planes.shape
        classes = self.leaves.shape[2]
        few = max(1, round(width**0.5))
        one_hot = F.one_hot(y.long(), classes).to(x.dtype)
        for t in range(trees):
            rows = torch.randint(len(x), (len(x),), device=x.device)
            parts = [(rows, torch.arange(len(target), device=x.device))]
            for m in range(nodes):  # breadth first: node m has the children 2m + 1 and 2m + 2
                own, theirs = parts[m]
                chosen = torch.rand(self.candidates, width, device=x.device).argsort(1)[:, :few]
                draws = torch.randn(self.candidates, few, device=x.device, dtype=x.dtype)
                planes = torch.zeros(self.candidates, width, device=x.device, dtype=x.dtype).scatter(1, chosen, draws)
                if len(own) == 0:  # a leaf that the data did not reach: anything goes
                    parts += [(own, theirs), (own, theirs[:0])]
                    continue
                plane, threshold, spread = best_split(x[own], one_hot[own], target[theirs], planes, alignment)
                self.planes[t, m], self.thresholds[t, m], self.spreads[t, m] = plane, threshold, spread
                right, over = x[own] @ plane > threshold, target[theirs] @ plane > threshold
                parts += [(own[~right], theirs[~over]), (own[right], theirs[over])]
            counts = torch.stack([one_hot[own].sum(0) for own, _ in parts[nodes:]])
            self.leaves[t] = (counts + 1 / classes) / (counts.sum(1, keepdim=True) + 1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Soft way of ``[B, F]`` through the trees.

        Returns:
            The share that reaches each node ``[B, T, M]``, the share of it that goes right ``[B, T, M]``, and the share
            that ends in each leaf ``[B, T, M + 1]``.
        """
        with no_autocast(x):
            x = full(x)
            project = torch.einsum("bf,tmf->btm", x, self.planes.to(x.dtype)) - self.thresholds
            right = (project / (self.softness * self.spreads)).sigmoid()
            level, reached = torch.ones_like(right[:, :, :1]), []
            for d in range(self.depth):
                reached.append(level)
                g = right[:, :, 2**d - 1 : 2 ** (d + 1) - 1]
                level = torch.stack([level * (1 - g), level * g], 3).flatten(2)
            return torch.cat(reached, 2), right, level

    def votes(self, x: Tensor) -> Tensor:
        """Mean class distribution of the trees ``[B, C]`` for features ``[B, F]``."""
        _, _, ends = self.route(x)
        return torch.einsum("btl,tlc->bc", ends, self.leaves.to(ends.dtype)) / len(self.leaves)

    def unevenness(self, x: Tensor) -> Tensor:
        """Mean over nodes of ``(2 s - 1)^2``, s the share of what reaches the node that goes right, of ``[B, F]``."""
        reached, right, _ = self.route(x)
        share = (reached * right).sum(0) / reached.sum(0).clamp_min(1e-6)
        return (2 * share - 1).square().mean()
