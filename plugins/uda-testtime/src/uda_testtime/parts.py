"""Pieces that several test-time methods share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uda.errors import UDAError
from uda.nn import full, no_autocast
from uda.nn.heads import class_vectors
from uda_testtime.adapter import Adapter
from uda_testtime.checks import check_head
from uda_testtime.source import SourceSamples
from uda_testtime.views import cotta_view


def cross_entropy(target: Tensor, logits: Tensor) -> Tensor:
    """``-sum_c softmax(target)_c log softmax(logits)_c`` of two logits ``[B, C]``, ``[B]``; gradients reach both."""
    with no_autocast(logits):
        return -(full(target).softmax(1) * full(logits).log_softmax(1)).sum(1)


def symmetric_cross_entropy(a: Tensor, b: Tensor) -> Tensor:
    """``(CE(a, b) + CE(b, a)) / 2`` of two logits ``[B, C]``, ``[B]`` (RMT: Doebler et al., CVPR 2023, eq. 2)."""
    return (cross_entropy(a, b) + cross_entropy(b, a)) / 2


def all_parameters(a: Adapter, who: str) -> list[nn.Parameter]:
    """All parameters of the net."""
    if not (found := list(a.net.parameters())):
        raise UDAError(f"{who}: the model has no parameters to train.")
    return found


def keep_start(a: Adapter, name: str = "start") -> None:
    """Copies of the trained parameters as they are now, as ``a.extra[name]``."""
    a.add(name, nn.ParameterList([p.detach().clone() for p in a.parameters]))


@torch.no_grad()
def restore_at_random(a: Adapter, start: list[Tensor], rate: float) -> None:
    """Each entry of the trained parameters goes back to ``start`` with probability ``rate`` (CoTTA, eq. 7 and 8)."""
    if rate <= 0:
        return
    for p, q in zip(a.parameters, start, strict=True):
        p.copy_(torch.where(a.rand_like(p) < rate, q, p))


def colour_view(a: Adapter, x: Tensor, flip: bool = True, **options: float | bool | str) -> Tensor:
    """A view of inputs by :func:`~uda_testtime.views.cotta_view`; of feature rows by noise."""
    return a.view(x, None if x.dim() == 2 else partial(cotta_view, flip=flip, **options))


@contextmanager
def seeded(a: Adapter) -> Iterator[None]:
    """Inside, torch's global generator is seeded by the adapter's; outside it is as before."""
    seed = int(torch.randint(2**31, (), generator=a.generator))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def feature_size(a: Adapter, who: str) -> tuple[int, int]:
    """Number of features and of classes, ``D`` and ``C``, of the classifier; ``who`` needs them, for the message."""
    head = a.net.get_submodule(check_head(a.head, who))
    if isinstance(head, nn.Linear):
        return head.in_features, head.out_features
    c, d = class_vectors(head, who).shape
    return d, c


def add_projector(a: Adapter, width: int) -> list[nn.Parameter]:
    """``a.extra["projector"]``, Linear-ReLU-Linear from the features to ``width``, 0: none; its parameters."""
    d, _ = feature_size(a, "The projector")
    with seeded(a):
        layers = [nn.Linear(d, width), nn.ReLU(), nn.Linear(width, width)] if width else []
    dtype = next(a.net.parameters()).dtype
    return list(a.add("projector", nn.Sequential(*layers).to(dtype), trained=True).parameters())


@torch.no_grad()
def class_prototypes(a: Adapter, source: SourceSamples, batch_size: int) -> Tensor:
    """Mean features of each source class, ``[C, D]``; zeros for a class without samples.

    Batches are shuffled: BatchNorm may use their statistics.
    """
    device = next(a.net.parameters()).device
    total, count = None, None
    for batch in source.batches(batch_size, a.generator):
        f, logits = a.features(batch["x"].to(device))
        f, y = full(f).flatten(1), batch["y"].to(device)
        if total is None:
            total, count = f.new_zeros(logits.shape[1], f.shape[1]), f.new_zeros(logits.shape[1])
        total.index_add_(0, y, f)
        count.index_add_(0, y, torch.ones_like(y, dtype=f.dtype))
    return total / count.clamp_min(1)[:, None]


def nearest_prototype(prototypes: Tensor, features: Tensor) -> Tensor:
    """Class ``[B]`` of the prototype ``[C, D]`` nearest by cosine to each row; a prototype of zeros is none."""
    with no_autocast(features), torch.no_grad():
        cosine = F.normalize(full(features), dim=1) @ F.normalize(full(prototypes), dim=1).T
        return cosine.masked_fill(prototypes.norm(dim=1) == 0, -torch.inf).argmax(1)


def view_contrast(views: Tensor, temperature: float = 0.1, skip: Tensor | None = None) -> Tensor:
    """Contrastive loss between views of a sample (Khosla et al., 2020, without labels; RMT, eq. 4).

    Args:
        views: ``[B, V, D]``, not normalised; temperature: tau.
        skip: pairs ``[B V, B V]`` (sample by sample) that are no negatives; None: none.

    Returns:
        Mean over the ``B V`` anchors of the mean over their ``V - 1`` positives of ``-log softmax``.
    """
    with no_autocast(views):
        b, v, _ = views.shape
        u = F.normalize(full(views), dim=2).flatten(0, 1)
        self_pair = torch.eye(b * v, dtype=torch.bool, device=u.device)
        positive = torch.block_diag(*[torch.ones(v, v, dtype=torch.bool)] * b).to(u.device) & ~self_pair
        hidden = self_pair if skip is None else self_pair | (skip & ~positive)
        log_p = (u @ u.T / temperature).masked_fill(hidden, -torch.inf).log_softmax(1)
        return -log_p.masked_fill(~positive, 0.0).sum(1).mean() / (v - 1)


def same_prototype(nearest: Tensor, views: int) -> Tensor:
    """Pairs ``[B V, B V]`` of first views that are one and the same prototype."""
    same = nearest[:, None] == nearest
    first = torch.zeros(views, views, dtype=torch.bool, device=nearest.device)
    first[0, 0] = True
    return torch.kron(same.int(), first.int()).bool()
