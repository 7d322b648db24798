"""Domain Conditioned Adaptation Network (Li et al., AAAI 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.errors import check_choice
from uda.kernels import multi_kernel_mmd
from uda.losses import class_distributions, mean_entropy
from uda.nn import active_domain, domain_context
from uda_conditioned.attention import ChannelAttention
from uda_conditioned.points import PLACES, condition

BANDWIDTH = 1.68  # of the kernel on class probabilities and logits, fixed as in the authors' code
REGULARISERS = ("random", "class", "none")


def adaptation_block(features: int, hidden: int) -> nn.Sequential:
    """Linear-ReLU-Linear, ``[B, features] -> [B, features]``: the difference between the domains, small at first."""
    block = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, features))
    for layer in (block[0], block[2]):
        nn.init.normal_(layer.weight, std=0.005)
        nn.init.constant_(layer.bias, 0.1)
    return block


def _adapt_logits(head: nn.Module, inputs: Any, logits: Tensor) -> Tensor | None:
    domain = active_domain()
    if domain is not None and domain.role == "source":
        return None
    return logits + head.adaptation(logits)


class DCAN(uda.Plugin):
    """Channel attention by domain, and blocks that carry the target's features and logits over to the source's.

    Convolutional stages are shared but for the first layer of their channel attention. For the target,
    ``f^ = f + D1(f)`` and ``o^ = o + D2(o)`` with ``o = W f^``, in training and in inference; sources go without. With
    source features f and logits o,

    ``L = L_cls + weight * (MMD(f_s, f^_t) + MMD(softmax o_s, softmax o^_t) + R / C) + entropy_weight * mean H(o^_t)``

    where ``R = sum_k MMD(f_s of class k, f^_s of a subset) + MMD(o_s of class k, o^_s of the subset)`` keeps the blocks
    from leaving the source's distribution. Features have five Gaussian kernels around the mean squared distance,
    probabilities and logits one. Published: SE-ResNet with frozen BatchNorm (``freeze_norm: true``).

    Args:
        weight: of the discrepancies (alpha, the authors' code: 1.5).
        entropy_weight: of the target's entropy (beta, 0.1).
        where: place of the attention: ``se`` (the network's squeeze-and-excitation layers keep their weights),
            ``blocks`` (residual blocks of ResNets), ``stages`` (last layer at each resolution), ``features`` (hidden
            features of an MLP, or the backbone's output), ``auto`` (the first of these that there is), or a list of
            names of layers; an empty list is no attention.
        reduction: channels over hidden width of new attention (16), which has at least 8 hidden units.
        regulariser: subset of R: ``random``: each source sample with probability ``random_prob / C`` (the authors'
            code); ``class``: the samples of class k; ``none``: R is left out.
        random_prob: expected share of a class's size in the random subset (0.8).
        estimator: of the MMD: ``biased``, or ``circular`` (neighbours in the batch, as in the authors' code).
        hidden: hidden width of the feature block (128).
        adapt_lr_scale: learning rate of the blocks relative to the head's (0.001: a hundredth of the backbone's).
        attention_lr_scale: the same for new attention; squeeze-and-excitation layers train with the backbone.
        freeze_norm: keep the backbone's BatchNorm at its (pretrained) statistics, scale and shift.
    """

    settings = ("closed", "multi-source")
    gated: ClassVar[bool] = False
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 3.0, "log"), "entropy_weight": (0.01, 1.0, "log"), "adapt_lr_scale": [0.001, 0.01, 0.1],
    }  # fmt: skip

    def __init__(
        self,
        weight: float = 1.5,
        entropy_weight: float = 0.1,
        where: str | Sequence[str] = "auto",
        reduction: int = 16,
        regulariser: str = "random",
        random_prob: float = 0.8,
        estimator: str = "biased",
        hidden: int = 128,
        adapt_lr_scale: float = 0.001,
        attention_lr_scale: float = 1.0,
        freeze_norm: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if weight < 0 or entropy_weight < 0 or random_prob < 0:
            raise uda.UDAError(f"{name}: weight, entropy_weight and random_prob must not be negative.")
        if reduction < 1 or hidden < 1:
            raise uda.UDAError(f"{name}: reduction and hidden must be at least 1.")
        for option, value, choices in (
            ("regulariser", regulariser, REGULARISERS), ("estimator", estimator, ("biased", "circular")),
            ("where", where if isinstance(where, str) else "auto", PLACES),
        ):  # fmt: skip
            check_choice(name, option, value, choices)
        self.weight, self.entropy_weight, self.where, self.reduction = weight, entropy_weight, where, reduction
        self.regulariser, self.random_prob, self.estimator, self.hidden = regulariser, random_prob, estimator, hidden
        self.adapt_lr_scale, self.attention_lr_scale = adapt_lr_scale, attention_lr_scale
        self.freeze_norm = freeze_norm
        self.feature_block: nn.Sequential | None = None
        self.places: list[str] = []

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Attention in the backbone, the feature block here, and the logit block on the head; once."""
        if self.feature_block is not None:
            return
        if hasattr(model.head, "adaptation"):
            raise uda.UDAError(f"Plugin {self.key!r}: the network is domain-conditioned already; keep one such plugin.")
        self.places = condition(model.backbone, model.input_shape, self.where, self.reduction, self.gated)
        self.feature_block = adaptation_block(model.feature_dim, self.hidden)
        model.head.add_module("adaptation", adaptation_block(model.num_classes, model.num_classes))
        model.head.register_forward_hook(_adapt_logits)
        if self.freeze_norm:
            for norm in self._norms(model):
                norm.requires_grad_(False)

    @staticmethod
    def _norms(model: uda.UDA) -> list[nn.Module]:
        return [m for m in model.backbone.modules() if isinstance(m, _BatchNorm)]

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """Blocks and new attention at their own rates."""
        attention = [m for m in model.backbone.modules() if isinstance(m, ChannelAttention)]
        blocks = [*self.feature_block.parameters(), *model.head.adaptation.parameters()]
        return [
            {"name": f"{self.key}_blocks", "params": blocks, "lr_scale": self.adapt_lr_scale},
            {
                "name": f"{self.key}_attention",
                "params": [p for m in attention for p in m.parameters()],
                "lr_scale": self.attention_lr_scale,
            },
        ]

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """BatchNorm keeps its statistics where that is wanted."""
        if self.freeze_norm:
            for norm in self._norms(step.model):
                norm.eval()

    @uda.hookimpl
    def transform_features(self, batch: uda.DomainBatch, features: Tensor) -> Tensor | None:
        """The target's features ``[B, F]`` through the feature block."""
        return None if batch.role == "source" else features + self.feature_block(features)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Discrepancies of features and predictions, and the regulariser."""
        source, target = step.pooled("features"), step.target.features
        logits = step.pooled("logits").float()
        losses = {
            "features": multi_kernel_mmd(source, target, estimator=self.estimator),
            "logits": self._fixed(logits.softmax(1), step.target.logits.float().softmax(1), estimator=self.estimator),
        }
        if self.regulariser != "none":
            losses["regulariser"] = self._regulariser(step, source, logits)
        return {name: self.weight * loss for name, loss in losses.items()}

    @staticmethod
    def _fixed(source: Tensor, target: Tensor, **options: Any) -> Tensor:
        return multi_kernel_mmd(source, target, kernels=1, bandwidth=BANDWIDTH, **options)

    def _regulariser(self, step: uda.Step, features: Tensor, logits: Tensor) -> Tensor:
        """``R / C``: K weighted pairs over the same samples, so that no class needs a turn of its own."""
        model = step.model
        adapted = features + self.feature_block(features)
        with domain_context(model.target_name, "target"):
            adapted_logits = model.head(adapted)
        y = step.pooled("y")
        classes = logits.shape[1]
        one_hot = class_distributions(y, classes, logits.dtype).T  # [C, B]
        subset = one_hot
        if self.regulariser == "random":
            subset = (torch.rand(one_hot.shape, device=y.device) < self.random_prob / classes).to(logits.dtype)
        weights = {"source_weight": one_hot, "target_weight": subset}
        of_features = multi_kernel_mmd(features, adapted, **weights)
        return (of_features + self._fixed(logits, adapted_logits, **weights)).mean()

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Entropy of the adapted target predictions."""
        return {"entropy": self.entropy_weight * mean_entropy(step.target.logits)}
