"""A classifier for each source, and their mean on the target."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import uda
from uda.nn import Bottleneck, LinearHead, active_domain, no_autocast
from uda.nn.precision import full


def mean_of_probs(logits: list[Tensor], known: Tensor | None = None) -> Tensor:
    """Logarithm of the mean of the classifiers' softmax, ``[B, C]`` each -> ``[B, C]``: logits of their mean vote.

    Args:
        known: bool ``[M, C]``, the classes that each classifier was trained on: of the others it says nothing, and a
            class has the mean of those who know it. None: all.
    """
    with no_autocast(logits[0]):
        if known is None or bool(known.all()):
            return torch.stack([full(z).log_softmax(1) for z in logits]).logsumexp(0) - math.log(len(logits))
        votes = [full(z).masked_fill(~k, -torch.inf).log_softmax(1) for z, k in zip(logits, known, strict=True)]
        return (torch.stack(votes).logsumexp(0) - known.sum(0).log()).log_softmax(1)


class SourceHeads(nn.Module):
    """In the place of ``model.head``: a source's features go to its own classifiers, the target's to all.

    Features of a source get the logits of its first classifier; those of the target (and where no domain is active)
    :func:`mean_of_probs` of all classifiers.

    Args:
        names: of the sources; in_features: F; num_classes: C.
        hidden: width of a Linear-BatchNorm-ReLU of its own before each source's classifiers; 0: none.
        copies: classifiers of each source.
        missing: ids of the classes that a source lacks, by name: its classifiers have no vote on them.
    """

    known: Tensor

    def __init__(
        self, names: list[str], in_features: int, num_classes: int, hidden: int = 0, copies: int = 1,
        missing: Mapping[str, list[int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        known = torch.ones(len(names), num_classes, dtype=torch.bool)
        for i, name in enumerate(names):
            known[i, list((missing or {}).get(name, ()))] = False
        self.register_buffer("known", known, persistent=False)
        self.names, self.in_features, self.num_classes = list(names), in_features, num_classes
        self.owner = ""  # the method whose they are
        width = hidden or in_features
        self.branches = nn.ModuleList(Bottleneck(in_features, hidden) if hidden else nn.Identity() for _ in names)
        self.classifiers = nn.ModuleList(
            nn.ModuleList(LinearHead(width, num_classes) for _ in range(copies)) for _ in names
        )

    def branch(self, i: int, features: Tensor) -> Tensor:
        """Features ``[B, H]`` of source i's branch."""
        return self.branches[i](features)

    def each(self, i: int, features: Tensor) -> list[Tensor]:
        """Logits ``[B, C]`` of source i's classifiers, from shared features ``[B, F]``."""
        own = self.branch(i, features)
        return [c(own) for c in self.classifiers[i]]

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F] -> [B, C]``."""
        domain = active_domain()
        if domain is not None and domain.role == "source" and domain.name in self.names:
            i = self.names.index(domain.name)
            return self.classifiers[i][0](self.branch(i, features))
        each = [self.each(i, features) for i in range(len(self.names))]
        return mean_of_probs([z for own in each for z in own], self.known.repeat_interleave(len(each[0]), 0))


def put_heads(model: uda.UDA, names: list[str], who: str, hidden: int = 0, copies: int = 1) -> SourceHeads:
    """Replace the model's head by a :class:`SourceHeads`, once.

    Raises:
        UDAError: another plugin has replaced the head.
    """
    own = isinstance(model.head, SourceHeads) and model.head.owner == who
    if not own:
        if type(model.head).__module__ != LinearHead.__module__:
            raise uda.UDAError(
                f"{who} puts a classifier for each source in the place of the model's head, but another plugin has "
                "replaced it already: take one of the two."
            )
        missing = model.missing_classes
        if alone := [c for c in range(model.num_classes) if all(c in missing.get(n, ()) for n in names)]:
            name = (model.class_names or range(model.num_classes))[alone[0]]
            raise uda.UDAError(f"{who}: no source has a training sample of class {name!r}; leave it out: data.classes.")
        model.head = SourceHeads(names, model.feature_dim, model.num_classes, hidden, copies, missing)
        model.head.owner = who
    return model.head
