"""Weighted gradients in automatic optimisation.

ParetoDA, MGDA, PCGrad and CAGrad end in a weighted sum of the objectives' gradients on the shared parameters and
need only inner products to choose the weights. :class:`Objectives` gives the inner products and turns weights
into *one* scalar whose ordinary backward gives backbone and bottleneck the weighted and the heads the plain
gradients, so that mixed precision, clipping, accumulation and DDP work as in any run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from uda.errors import UDAError, nearest
from uda.nn.precision import no_autocast
from uda.ranks import mean_over_ranks

if TYPE_CHECKING:
    from uda.step import Step

Level = Literal["features", "bottleneck", "parameters"]
Grads = list[tuple[Tensor, ...]]


def gradients(losses: Sequence[Tensor], inputs: Sequence[Tensor]) -> Grads:
    """Gradient of each loss with respect to each input, zeros where a loss does not reach it."""
    inputs = list(inputs)
    return [
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        if loss.requires_grad
        else tuple(torch.zeros_like(i) for i in inputs)
        for loss in losses
    ]


def gram(left: Grads, right: Grads) -> Tensor:
    """Inner products ``[len(left), len(right)]`` in float32."""
    total: Tensor | float = 0.0
    for xs, ys in zip(zip(*left, strict=True), zip(*right, strict=True), strict=True):  # an input at a time
        with no_autocast(xs[0]):
            x = torch.stack([g.flatten() for g in xs]).float()
            total = total + x @ (x if left is right else torch.stack([g.flatten() for g in ys]).float()).T
    return torch.as_tensor(total)


def gated_sum(losses: Sequence[Tensor], weights: Tensor, inputs: Sequence[Tensor], grads: Grads) -> Tensor:
    """A scalar whose gradient on ``inputs`` is ``sum_i w_i g_i`` and elsewhere that of the plain sum.

    Args:
        losses: K scalars; ``weights``: ``[K]``; ``inputs``: the tensors that stand between shared and private
            parameters; ``grads``: their gradients by loss, from :func:`gradients`.
    """
    total = torch.stack([loss.float() for loss in losses]).sum()
    extra = [
        (z.float() * sum((w - 1) * g[k].float() for w, g in zip(weights, grads, strict=True)).detach()).sum()
        for k, z in enumerate(inputs)
    ]
    # the correction carries gradient only: its value is taken off again, so that the sum stays readable
    correction = torch.stack(extra).sum()
    return total + correction - correction.detach()


class Objectives(Mapping[str, Tensor]):
    """The objectives of a step by name, with the inner products of their gradients on demand."""

    def __init__(self, losses: dict[str, Tensor], step: Step) -> None:
        self._losses, self._step = losses, step
        self._cache: dict[str, Grads] = {}
        self._grams: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._losses[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._losses)

    def __len__(self) -> int:
        return len(self._losses)

    def _inputs(self, level: Level) -> list[Tensor]:
        model = self._step.model
        if level == "features":
            if not self._step.gate:
                raise UDAError(
                    "No objective of this step used the features, so their gradients cannot be weighed. "
                    "Set model.gate_level to 'parameters'."
                )
            return self._step.gate
        modules = [model.bottleneck] if level == "bottleneck" else [model.backbone, model.bottleneck]
        found = [p for m in modules for p in m.parameters() if p.requires_grad]
        if not found:
            raise UDAError(f"No trainable parameter at gate level {level!r}: choose another model.gate_level.")
        return found

    def grads(self, level: Level) -> Grads:
        """Gradients of all objectives at a level on this rank; computed once a step.

        A backward to the parameters passes the features: what :meth:`combine` needs there is kept on the way.
        """
        if level not in self._cache:
            on_the_way = [] if level == "features" or self._step.model.reruns_backbone else self._step.gate
            found = gradients(list(self._losses.values()), [*on_the_way, *self._inputs(level)])
            self._cache[level] = [g[len(on_the_way) :] for g in found]
            if on_the_way:
                self._cache.setdefault("features", [g[: len(on_the_way)] for g in found])
        return self._cache[level]

    def gram(self, level: Level | None = None) -> Tensor:
        """Inner products ``[K, K]`` of the objectives' gradients, float32, equal on all ranks.

        At level ``"features"`` the samples of all ranks add up exactly; at ``"bottleneck"`` and ``"parameters"``
        the gradients are averaged over ranks first. Default: ``model.gate_level``.
        """
        level = level or self._step.model.gate_level
        if level not in self._grams:
            grads = self.grads(level)
            if level == "features":
                self._grams[level] = self._reduce(gram(grads, grads))
            else:
                mean = [mean_over_ranks(g) for g in grads]
                self._grams[level] = gram(mean, mean)
        return self._grams[level]

    def inner(self, other: Tensor, level: Level = "parameters") -> Tensor:
        """Inner products ``[K]`` of each objective's gradient with that of ``other`` (on a held-out batch, say).

        Only shared *parameters* have a meaning here, since the features belong to other samples. :meth:`gram` at the
        same level costs nothing after it.
        """
        if level == "features":
            raise UDAError("Gradients of another batch compare on parameters: use level 'bottleneck' or 'parameters'.")
        every = [mean_over_ranks(g) for g in (*self.grads(level), *gradients([other], self._inputs(level)))]
        found = gram(every, every)
        self._grams[level] = found[:-1, :-1]
        return found[:-1, -1]

    def combine(self, weights: Mapping[str, Tensor | float]) -> Tensor:
        """One scalar whose backward applies the weights to backbone and bottleneck; see :func:`gated_sum`.

        For the net the weights are constants. A weight that carries a gradient (a learnt one) gets the gradient of
        ``w_i L_i`` with the objective held fixed.
        """
        if unknown := [n for n in weights if n not in self._losses]:
            raise UDAError(f"weigh_objectives returned a weight for {unknown[0]!r}. {nearest(unknown[0], self)}")
        first = next(iter(self._losses.values()))
        w = torch.stack([torch.as_tensor(weights.get(n, 1.0), dtype=torch.float32, device=first.device) for n in self])
        level: Level = "parameters" if self._step.model.reruns_backbone else "features"
        total = gated_sum(list(self._losses.values()), w.detach(), self._inputs(level), self.grads(level))
        if w.requires_grad:
            total = total + ((w - w.detach()) * torch.stack([x.detach().float() for x in self._losses.values()])).sum()
        return total

    @staticmethod
    def _reduce(matrix: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(matrix)
            matrix = matrix / dist.get_world_size() ** 2  # as one process with the whole batch would see it
        return matrix
