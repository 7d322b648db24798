"""LanDA: Language-Guided Multi-Source Domain Adaptation (Wang et al., arXiv 2401.14148, 2024)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from uda_transport.solvers import entropic_plan

import uda
from uda.kernels import squared_distances
from uda.losses import classification_loss
from uda.nn import full, no_autocast
from uda_multisource.language import read_prompts


def direction_loss(moved: Tensor, z: Tensor, towards: Tensor) -> Tensor:
    """``mean 1 - cos(z~ - z, t)``: embeddings move as the words do. All ``[B, D]``."""
    with no_autocast(moved):
        return (1 - F.cosine_similarity(full(moved) - full(z), full(towards), dim=1)).mean()


def word_loss(moved: Tensor, words: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of ``cos(z~, words) / temperature``: a moved embedding keeps its class.

    Args:
        moved: ``[B, D]``; words: of the target's classes ``[C, D]``; y: ``[B]``.
    """
    with no_autocast(moved):
        return F.cross_entropy(F.normalize(full(moved), dim=1) @ F.normalize(full(words), dim=1).T / temperature, y)


def extended_distance(
    one: Tensor, other: Tensor, y_one: Tensor, y_other: Tensor, words: Tensor, word_cost: float, epsilon: float
) -> Tensor:
    """Transport cost of two extended domains: ``sum P C``, ``C = |z~ - z~'|^2 + word_cost (1 - cos(t_y, t_y'))``.

    The plan is entropic and a constant; epsilon is a share of the mean cost.

    Args:
        one, other: ``[n, D]``, ``[m, D]``; y_one, y_other: their classes; words: ``[C, D]``.
    """
    with no_autocast(one):
        between = 1 - (w := F.normalize(full(words), dim=1)) @ w.T
        cost = squared_distances(full(one), full(other)) + word_cost * between[y_one][:, y_other]
        constant = cost.detach()
        plan = entropic_plan(constant, epsilon * constant.mean().clamp_min(1e-12), 200, 1e-4)
        return (plan.to(cost.dtype) * cost).sum()


class Augmenter(nn.Module):
    """``z -> normalised z + MLP(z)``: where an embedding of a source would be in the described target, ``[B, D]``."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, z: Tensor) -> Tensor:
        """Of length 1."""
        return F.normalize(z + self.net(z), dim=1)


class LanDA(uda.Plugin):
    """Adaptation to a target of which only a description in words is known (Wang et al. 2024).

    Inputs are image embeddings z of a frozen joint encoder (``backbone: identity``, ``bottleneck: 0``, features of
    length 1). For each source k an augmenter f_k makes an extended domain ``z~ = f_k(z)``, that looks like the target:

        direction * (1 - cos(z~ - z, T_target,y - T_k,y)) + words * CE(cos(z~, T_target) / temperature, y)
        + transport * W(z~_i, z~_j) of all pairs of sources

    and the classifier trains on z and, with ``weight``, on z~, held fixed. T are the words' embeddings. No image of the
    target takes part. With one source the first two terms are those of LADS (Dunlap et al., ICLR 2023). The
    forms of the first term and of W are taken from there and from the paper's summary; its weights are not known to us.

    Args:
        prompts: file with the embeddings of each domain's classes, see :func:`uda_multisource.language.prompts`. Once
            trained, a model is loaded without it.
        direction, words, transport: weights of the augmenters' losses.
        weight: of the classification of extended samples.
        temperature: of the similarities to words, CLIP's 0.01.
        word_cost: of two classes' words in W.
        epsilon: of the entropic plan, as a share of the mean cost.
        hidden: width of an augmenter.
        lr_scale: rate of the augmenters relative to the head's.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.1, 3.0, "log"), "transport": (0.01, 1.0, "log")}
    text: Tensor

    def __init__(
        self,
        prompts: str,
        direction: float = 0.5,
        words: float = 0.5,
        transport: float = 0.1,
        weight: float = 1.0,
        temperature: float = 0.01,
        word_cost: float = 1.0,
        epsilon: float = 0.05,
        hidden: int = 384,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if min(direction, words, transport, weight, word_cost) < 0 or min(temperature, epsilon) <= 0 or hidden < 1:
            raise uda.UDAError("LanDA: weights must not be negative; temperature, epsilon and hidden are positive.")
        self.prompts, self.direction, self.words, self.transport = str(prompts), direction, words, transport
        self.weight, self.temperature, self.word_cost, self.epsilon = weight, temperature, word_cost, epsilon
        self.hidden, self.lr_scale = hidden, lr_scale
        self.augmenters = nn.ModuleList()

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Sources alone: the target's images are for evaluation."""
        return uda.DataNeeds(target=False)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """An augmenter for each source, and the words: ``text`` ``[sources + target, C, D]``.

        Raises:
            UDAError: words of other classes, of another width, or none for a domain of the run.
        """
        if len(self.augmenters):
            return
        names = [*model.source_names, model.target_name]
        self.augmenters.extend(Augmenter(model.feature_dim, self.hidden) for _ in model.source_names)
        self.register_buffer("text", torch.zeros(len(names), model.num_classes, model.feature_dim))
        if not Path(self.prompts).is_file():  # a trained model brings its own; training without is refused below
            return
        found = read_prompts(self.prompts, "LanDA")
        if missing := [n for n in names if n not in found["domains"]]:
            raise uda.UDAError(
                f"LanDA: {self.prompts!r} has no words for domain {missing[0]!r}, only for {found['domains']}."
            )
        if found["text"].shape[1:] != self.text.shape[1:]:
            raise uda.UDAError(
                f"LanDA: the words are of {found['text'].shape[1]} classes in {found['text'].shape[2]} dimensions, the "
                f"run has {model.num_classes} classes and features of {model.feature_dim}: images and words must come "
                "from one encoder, and nothing lie between (model.backbone: identity, model.bottleneck: 0)."
            )
        ours = list(model.class_names or found["classes"])
        if set(ours) == set(found["classes"]) and ours != found["classes"]:
            raise uda.UDAError(f"LanDA: the words' classes {found['classes'][:5]} are in another order than {ours[:5]}")
        self.text.copy_(found["text"][[found["domains"].index(n) for n in names]])

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The augmenters at their own rate."""
        return [{"name": self.key, "params": self.augmenters.parameters(), "lr_scale": self.lr_scale}]

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The augmenters' losses, and the classification of what they make."""
        if not self.text.any():
            read_prompts(self.prompts, "LanDA")  # says that there is no such file
        target, smoothing = self.text[-1], step.model.label_smoothing
        ys, moved, found = [], [], {"direction": 0.0, "words": 0.0, "extended": 0.0}
        for own, augmenter, batch in zip(self.text, self.augmenters, step.sources.values(), strict=False):
            z = F.normalize(batch.features.detach(), dim=1)
            made, towards = augmenter(z), (target - own)[batch.y]
            logits = step.model.head(made.detach())
            found["direction"] = found["direction"] + direction_loss(made, z, towards)
            found["words"] = found["words"] + word_loss(made, target, batch.y, self.temperature)
            found["extended"] = found["extended"] + classification_loss(logits, batch.y, smoothing, batch.weight)
            ys.append(batch.y)
            moved.append(made)
        count = len(moved)
        out = {
            "direction": self.direction / count * found["direction"],
            "words": self.words / count * found["words"],
            "extended": self.weight / count * found["extended"],
        }
        if self.transport and count > 1:
            pairs = [
                extended_distance(moved[i], moved[j], ys[i], ys[j], target, self.word_cost, self.epsilon)
                for i, j in itertools.combinations(range(count), 2)
            ]
            out["transport"] = self.transport * torch.stack(pairs).mean()
        return out
