"""Noisy teacher-student with Laplacian adjustment (NOTELA: Boudiaf et al., ICML 2023)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.nn import full, no_autocast
from uda.pseudo import pseudo_cross_entropy
from uda_sourcefree.neighbours import NeighbourMemory, nearest


@torch.no_grad()
def teacher_labels(
    logits: Tensor,
    near_probs: Tensor,
    weight: Tensor,
    strength: float = 2.0,
    temperature: float = 1.0,
    multi_label: bool = False,
) -> Tensor:
    """``y_i ~ p_i^(1/a) exp(lambda/a * sum_j w_ij p_j / sum_j w_ij)``, normalised over the classes.

    The maximiser of the paper's objective: the own prediction, its entropy weighed by a, and agreement with neighbours
    weighed by lambda. A sample without neighbours has its own prediction sharpened by a.

    Args:
        logits: ``[B, C]``; near_probs: class probabilities of the neighbours ``[B, K, C]``; weight: 0 or 1 ``[B, K]``.
        strength: lambda; temperature: a.
        multi_label: probabilities are of a sigmoid, and each class is a problem of the two classes "yes" and "no".
    """
    total = (weight[:, :, None] * near_probs).sum(1) / weight.sum(1, keepdim=True).clamp(min=1e-8)
    if multi_label:  # the logit of "yes" against "no", whose neighbours say 1 - p
        some = (weight.sum(1, keepdim=True) > 0).to(total.dtype)
        return ((full(logits) + strength * (2 * total - some)) / temperature).sigmoid()
    return ((full(logits).log_softmax(1) + strength * total) / temperature).softmax(1)


@torch.no_grad()
def mutual(near: Tensor, theirs: Tensor, index: Tensor) -> Tensor:
    """1 where a sample is among its neighbour's neighbours, ``[B, K]`` from ``[B, K]``, ``[B, K, K]`` and ``[B]``."""
    return (theirs == index[:, None, None]).any(2).to(torch.float32)


class NOTELA(NeighbourMemory):
    """A student under dropout learns soft labels of a clean teacher that agrees with its neighbours.

    ``CE(y_i, h(dropout(f_i)))`` with ``y`` of :func:`teacher_labels`: the model itself without that dropout, and the
    Euclidean neighbours of the features in the whole target. On multi-label data each class is a problem of two
    classes, and the student's loss binary cross-entropy. Start from the source's model: ``model.init_from``.

    Args:
        neighbours: K; published: 15 (vision), 5 (audio). The authors' code counts the sample itself among them.
        strength: lambda; published: 2 (vision), 1 (audio); temperature: alpha; published: 1.
        mode: ``online``: labels of each batch in the step, from a memory written after each step (vision); ``offline``:
            labels of the whole target at the start of each epoch (audio).
        mutual: neighbours count where each is one of the other (published for vision).
        dropout: share of the features that the student misses, before the classifier. Not printed for vision.
        trainable: ``batch_norm``: scales and shifts of BatchNorm alone, as published; ``all``: the whole model.
        freeze_statistics: BatchNorm normalises with the source's statistics, and keeps them; published for audio.
    """

    settings = ("closed", "partial", "source-free", "multi-label")
    search_space: ClassVar[dict[str, Any]] = {
        "neighbours": [5, 10, 15], "strength": (0.1, 4.0, "log"), "trainable": ["batch_norm", "all"],
    }  # fmt: skip
    labels: Tensor

    def __init__(
        self,
        neighbours: int = 15,
        strength: float = 2.0,
        temperature: float = 1.0,
        mode: Literal["online", "offline"] = "online",
        mutual: bool = True,
        dropout: float = 0.5,
        trainable: Literal["batch_norm", "all"] = "batch_norm",
        freeze_statistics: bool = False,
    ) -> None:
        super().__init__(neighbours)
        if strength < 0 or temperature <= 0 or not 0 <= dropout < 1:
            raise uda.UDAError("NOTELA: strength must not be negative, temperature above 0, and dropout in [0, 1).")
        if mode not in ("online", "offline") or trainable not in ("batch_norm", "all"):
            raise uda.UDAError("NOTELA: mode is 'online' or 'offline', trainable 'batch_norm' or 'all'.")
        self.strength, self.temperature, self.mode = strength, temperature, mode
        self.mutual, self.dropout, self.trainable = mutual, dropout, trainable
        self.freeze_statistics = freeze_statistics

    def keys(self, features: Tensor) -> Tensor:
        """Features as they are: neighbours are Euclidean."""
        return full(features)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The memory, and what does not train.

        Raises:
            UDAError: BatchNorm alone should train and there is none, or fewer target samples than neighbours.
        """
        super().build(model)
        if self.trainable == "batch_norm":
            network = [model.backbone, model.bottleneck, model.head]  # what other plugins bring is theirs
            norms = [m for part in network for m in part.modules() if isinstance(m, _BatchNorm) and m.affine]
            if not norms:
                raise uda.UDAError("NOTELA: the model has no BatchNorm to train. Set trainable: all.")
            kept = {id(p) for m in norms for p in m.parameters(recurse=False)}
            for p in (p for part in network for p in part.parameters()):
                p.requires_grad_(id(p) in kept)
        if self.mode == "offline" and "labels" not in self._buffers:
            self.register_buffer("labels", torch.zeros(len(self.memory.probs), model.num_classes))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Online: fill the memory, once. Offline: labels of the whole target."""
        if self.mode == "online":
            return super().refresh(model, bank)
        pool = bank.target
        everyone = torch.arange(len(pool.features), device=pool.features.device)
        self._write(everyone, pool.features, pool.logits)
        near = nearest(self.memory.features, self.memory.features, self.neighbours, everyone, euclidean=True)
        for rows in everyone.split(4096):  # [rows, K, K] and [rows, K, C] at a time
            weight = mutual(near[rows], near[near[rows]], rows) if self.mutual else torch.ones_like(near[rows]).float()
            probs = self.memory.probs[near[rows]]
            self.labels[rows] = self._teach(pool.logits[rows], probs, weight)

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """BatchNorm as in inference, where its statistics are to stay (each epoch puts it back into training)."""
        if self.freeze_statistics:
            for module in step.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()

    def _teach(self, logits: Tensor, near_probs: Tensor, weight: Tensor) -> Tensor:
        return teacher_labels(logits, near_probs, weight, self.strength, self.temperature, self.multi_label)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """Soft labels of the batch."""
        index, logits = step.target.index, step.target.logits.detach()
        if self.mode == "offline":
            labels = self.labels[index]
            return uda.PseudoLabels(labels.argmax(1), soft=labels)
        memory, k = self.memory, self.neighbours
        with no_autocast(logits):
            near = nearest(self.keys(step.target.features.detach()), memory.features, k, index, euclidean=True)
            weight = torch.ones_like(near, dtype=torch.float32)
            if self.mutual:
                rows, place = near.unique(return_inverse=True)  # samples of a batch share neighbours
                theirs = nearest(memory.features[rows], memory.features, k, rows, euclidean=True)
                weight = mutual(near, theirs[place], index)
            labels = self._teach(logits, memory.probs[near], weight)
        self.log_later(neighbours=weight.sum(1).mean(), confidence=labels.amax(1).mean())
        return uda.PseudoLabels(labels.argmax(1), soft=labels)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The student, under dropout."""
        logits = step.model.head(F.dropout(step.target.features, self.dropout))
        return {"student": pseudo_cross_entropy(logits, step.target.pseudo, multi_label=self.multi_label)}
