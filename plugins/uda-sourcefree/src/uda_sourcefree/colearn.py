"""Co-learning with a second, frozen pretrained network (Co-learn: Zhang, Shen and Foo, ICCV 2023)."""

from __future__ import annotations

import zlib
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.data import Views
from uda.losses import class_distributions, classification_loss
from uda.nn import full, make_backbone, no_autocast
from uda.passes import map_pool
from uda.pseudo import mean_of_kept


@torch.no_grad()
def centroid_probs(features: Tensor, weight: Tensor, temperature: float = 0.01) -> Tensor:
    """``softmax_k(cos(g_i, c_k) / T)`` with ``c_k = sum_i w_ik g_i / sum_i w_ik``: ``[N, C]``.

    A class without any weight has no centroid and probability 0.

    Args:
        features: ``[N, G]``; weight: of each sample in each class, 0 or more ``[N, C]``.
    """
    with no_autocast(features):
        g, w = full(features), full(weight)
        mass = w.sum(0)
        centres = w.T @ g / mass.clamp(min=1e-12)[:, None]
        cosine = F.normalize(g, dim=1) @ F.normalize(centres, dim=1).T
        absent = (mass <= 1e-12) & bool((mass > 1e-12).any())
        return (cosine / temperature).masked_fill(absent, -torch.inf).softmax(1)


@torch.no_grad()
def match_or_conf(first: Tensor, second: Tensor, threshold: float = 0.5) -> tuple[Tensor, Tensor]:
    """Labels of two branches: where they agree, or else of the only one that is sure.

    Args:
        first: class probabilities ``[N, C]``; second: of the other branch.
        threshold: confidence above which a branch is sure.

    Returns:
        Labels ``[N]``, and a mask ``[N]`` of those that count; the others carry the first branch's label.
    """
    (sure_a, a), (sure_b, b) = first.max(1), second.max(1)
    sure_a, sure_b = sure_a > threshold, sure_b > threshold
    only_b = sure_b & ~sure_a
    return torch.where(only_b, b, a), (a == b) | (sure_a ^ sure_b)


class CoLearn(uda.Plugin):
    """A frozen network that never saw the source labels the target together with the adapting model.

    At the start of each epoch the second network's branch labels the target by its nearest centroids
    (:func:`centroid_probs`), and both branches together by :func:`match_or_conf`; the model trains on
    ``weight * CE(z_t, y)`` over the samples that got a label. Labels are pseudo-labels of the step, so that another
    source-free method behind this one trains on them (SHOT does). The classifier is frozen. Start from the source's
    model: ``model.init_from``.

    Args:
        network: the second network: an ``nn.Module`` giving features, with its pretrained weights, or one of the names
            of ``model.backbone`` that have any (``efficientnet-lite0``). ``identity``: inputs are its features already.
            No checkpoint holds it: a model that is loaded from one predicts without it, and training asks for it again.
        views: its own transforms (their test view), where it wants another size or normalisation; None: the run's.
        threshold: gamma; published: 0.5 on Office-31 and Office-Home, 0.1 on VisDA.
        temperature: of the cosines.
        centroids: weights of the samples in the centroids. ``labels``: the last labels, and the model's probabilities
            at the start; ``probabilities``: always these.
        weight: of the loss; 0: label for others alone.
        freeze_head: keep the source's classifier.
    """

    settings = ("closed", "source-free")
    search_space: ClassVar[dict[str, Any]] = {
        "threshold": [0.1, 0.3, 0.5, 0.7], "centroids": ["labels", "probabilities"],
    }  # fmt: skip
    labels: Tensor
    kept: Tensor
    check: Tensor

    def __init__(
        self,
        network: nn.Module | str = "identity",
        views: Views | None = None,
        threshold: float = 0.5,
        temperature: float = 0.01,
        centroids: Literal["labels", "probabilities"] = "labels",
        weight: float = 1.0,
        freeze_head: bool = True,
    ) -> None:
        super().__init__()
        if not 0 <= threshold <= 1 or temperature <= 0 or weight < 0:
            raise uda.UDAError("CoLearn: threshold in [0, 1], temperature above 0, and weight not negative.")
        if centroids not in ("labels", "probabilities"):
            raise uda.UDAError("CoLearn: centroids is 'labels' or 'probabilities'.")
        if isinstance(network, str) and network != "identity" and not network.startswith("efficientnet-lite"):
            raise uda.UDAError(
                f"CoLearn: a network {network!r} starts at random, and is to be a pretrained one: name a class with "
                "its weights, as network: {class_path: uda.nn.Timm, init_args: {name: resnet50, pretrained: true}}."
            )
        # in a list: the network never changes, so that no checkpoint and no optimiser needs it
        self._network = [make_backbone(network).requires_grad_(False).eval()]
        self.views, self.threshold, self.temperature = views, threshold, temperature
        self.centroids, self.weight, self.freeze_head = centroids, weight, freeze_head
        self._second: Tensor | None = None

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone, whole at the start of each epoch."""
        return uda.DataNeeds(source=False, refresh={"target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Freeze the classifier; room for a label of each target sample."""
        model.head.requires_grad_(not self.freeze_head)
        if "labels" not in self._buffers:
            size = max(model.sizes.get(model.target_name, 0), 1)
            self.register_buffer("labels", torch.full((size,), -1))
            self.register_buffer("kept", torch.zeros(size, dtype=torch.bool))
            self.register_buffer("check", torch.zeros((), dtype=torch.long))  # of the second network's weights

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Features of the second network, once; labels of both branches."""
        if self._second is None:
            self._second = self._features(model)
        probs = full(bank.target.logits).softmax(1)
        weight = probs
        if self.centroids == "labels" and bool(self.kept.any()):
            weight = class_distributions(self.labels, probs.shape[1], probs.dtype) * self.kept[:, None]
        second = centroid_probs(self._second, weight, self.temperature)
        labels, kept = match_or_conf(probs, second, self.threshold)
        self.labels.copy_(labels)
        self.kept.copy_(kept)
        self.log_later(labelled=kept.float().mean(), agree=(probs.argmax(1) == second.argmax(1)).float().mean())

    def _features(self, model: uda.UDA) -> Tensor:
        network = self._network[0]
        check = 0
        for value in network.state_dict().values():
            check = zlib.crc32(value.detach().cpu().contiguous().numpy().tobytes(), check)
        if int(self.check) not in (0, check):
            raise uda.UDAError(
                "CoLearn: the second network is another than that of the checkpoint, which holds no weights of it: "
                "give network with the same pretrained weights."
            )
        self.check.fill_(check)
        network.to(model.device)
        return map_pool(model, model.target_name, lambda x: network(x).flatten(1).float(), self.views)

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """The batch's labels, and which of them count."""
        index = step.target.index
        return uda.PseudoLabels(self.labels[index], keep=self.kept[index])

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Cross-entropy over the labelled samples; 0 in a batch without any."""
        index = step.target.index
        loss = classification_loss(step.target.logits, self.labels[index], reduction="none")
        return {"labels": self.weight * mean_of_kept(loss, self.kept[index])}
