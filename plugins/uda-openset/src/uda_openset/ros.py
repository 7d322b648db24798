"""Rotation-based Open Set adaptation (ROS: Bucci, Loghmani and Tommasi, ECCV 2020)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.images import rotate
from uda.losses import classification_loss, entropy
from uda.nn import full, no_autocast
from uda.passes import evaluating, map_pool
from uda_openset.unknown import UnknownClass, unknown_logit

TURNS = 4
SCALES = ("range", "log")


def rotation_scores(p: Tensor) -> tuple[Tensor, Tensor]:
    """How well a sample's rotations are told, and how uncertainly: ``(o, h)``, each ``[N]``.

    ``o = max_c mean_r p_r[c, r]``, the probability of the true rotation within the class that fits best, and ``h`` the
    mean entropy of ``p_r``.

    Args:
        p: probabilities ``[N, 4, 4 K]`` of (class, rotation), class-major, for the sample turned by r = 0..3 quarters.
    """
    own = p.unflatten(2, (-1, TURNS)).diagonal(dim1=1, dim2=3)  # [N, K, 4]: the true rotation only
    return own.mean(2).amax(1), torch.special.entr(p).sum(2).mean(1)


def normality(o: Tensor, h: Tensor, top: float | None = None) -> Tensor:
    """``max(o, 1 - h')`` of the whole target ``[N]``: near 1 for samples that look like known classes.

    Args:
        o, h: of :func:`rotation_scores`. top: ``h' = h / top``; None: h moved and scaled to [0, 1] over the target.
    """
    low, high = (0.0, top) if top is not None else (h.min(), h.max())
    return torch.maximum(o, 1 - (h - low) / max(float(high - low), 1e-12))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``[B]`` over a boolean mask ``[B]``; 0 where it is empty."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


class RelativeRotation(nn.Module):
    """Classifier of a pair (features of an image, features of the same image turned), ``2 [B, F] -> [B, out]``."""

    def __init__(self, features: int, hidden: int, out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2 * features, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2))
        self.top = nn.Linear(hidden, out)

    def forward(self, still: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[B, out]``, and what they are linear in ``[B, hidden]``."""
        v = self.body(torch.cat([still, turned], 1))
        return self.top(v), v


class ROS(UnknownClass):
    """First tells unknown from known target samples by rotations, then trains on both; for images.

    Until the share ``split`` of the run, on the source: classification over K + 1 classes, ``rotation_weight`` times
    the cross-entropy of class and relative rotation (4 K labels) and ``centre_weight`` times the squared distance of
    its last hidden layer to the centre of the label. At the first epoch that begins after that, :func:`normality` of
    the whole target: below its mean a sample counts as unknown. From then on: ``unknown_weight / K`` times the
    cross-entropy of unknown samples for class K + 1, ``rotation_weight`` times that of the relative rotation (4 labels,
    a new head) of known ones, and ``entropy_weight`` times their entropy over K + 1 classes.

    Args:
        split: share of the run that the first stage takes.
        rotation_weight: published 3. centre_weight: published 0.1 on Office-31, 0.001 on Office-Home.
        unknown_weight: weight of the class unknown relative to one of the source's classes; published 2.
        entropy_weight: published 0.1.
        entropy_scale: of the entropy in the normality: ``range``, to [0, 1] over the target, as in the authors' code;
            ``log``, over its maximum log 4K.
        hidden: width of the heads for rotations.
        lr_scale: learning rate of logit, heads and centres relative to the head's.
    """

    unused_parameters = True  # each stage has a head of its own
    search_space: ClassVar[dict[str, Any]] = {
        "rotation_weight": (0.3, 3.0, "log"), "unknown_weight": [1.0, 2.0], "entropy_weight": (0.01, 0.3, "log"),
    }  # fmt: skip
    known: Tensor
    scored: Tensor

    def __init__(
        self,
        split: float = 0.5,
        rotation_weight: float = 3.0,
        centre_weight: float = 0.1,
        unknown_weight: float = 2.0,
        entropy_weight: float = 0.1,
        entropy_scale: str = "range",
        hidden: int = 256,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(lr_scale)
        check_choice("ROS", "entropy_scale", entropy_scale, SCALES)
        if min(rotation_weight, centre_weight, unknown_weight, entropy_weight) < 0 or not 0 < split < 1 or hidden < 1:
            raise uda.UDAError("ROS: weights must not be negative, split lies between 0 and 1, and hidden is positive.")
        self.split, self.rotation_weight, self.centre_weight = split, rotation_weight, centre_weight
        self.unknown_weight, self.entropy_weight, self.entropy_scale = unknown_weight, entropy_weight, entropy_scale
        self.hidden = hidden
        self.source_head: RelativeRotation | None = None
        self.target_head: RelativeRotation | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Heads, centres, and room for the target's marks."""
        shape = tuple(model.input_shape)
        if len(shape) != 3 or shape[1] != shape[2]:
            raise uda.UDAError(
                f"ROS turns square images [C, S, S], and the inputs of this run have the shape {list(shape)}: crop "
                "images in data.views; for rows of features take OSBP, OVANet or DANCE."
            )
        super().build(model)
        if self.source_head is None:
            labels = TURNS * model.num_classes
            self.source_head = RelativeRotation(model.feature_dim, self.hidden, labels)
            self.target_head = RelativeRotation(model.feature_dim, self.hidden, TURNS)
            self.centres = nn.Parameter(torch.randn(labels, self.hidden))
            self.register_buffer("known", torch.zeros(model.sizes.get(model.target_name, 0), dtype=torch.bool))
            self.register_buffer("scored", torch.tensor(False))

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """All that is new, at its own rate."""
        return [{"name": self.key, "params": self.parameters(), "lr_scale": self.lr_scale}]

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Once, when the first stage is over: mark the target's samples as known or unknown."""
        if model.progress < self.split or self.scored:
            return
        with evaluating(model), model.trainer.precision_plugin.val_step_context():
            o, h = map_pool(model, model.target_name, lambda x: self.look(model, x)).unbind(1)
        top = math.log(TURNS * model.num_classes) if self.entropy_scale == "log" else None
        n = normality(o, h, top)
        self.known.copy_(n >= n.mean())
        self.scored.fill_(True)
        self.log_later(known_share=self.known.float().mean())

    def look(self, model: uda.UDA, x: Tensor) -> Tensor:
        """:func:`rotation_scores` of images ``[B, C, S, S]``, side by side ``[B, 2]``."""
        views = [rotate(x, torch.full((len(x),), k, device=x.device)) for k in range(TURNS)]
        f = [model.batch(v).features for v in views]
        logits = torch.stack([self.source_head(f[0], turned)[0] for turned in f], 1)
        return torch.stack(rotation_scores(full(logits).softmax(2)), 1)

    def turned(self, step: uda.Step, batch: uda.DomainBatch) -> tuple[Tensor, Tensor]:
        """Features of the batch turned at random ``[B, F]``, and by how many quarters ``[B]``."""
        quarters = torch.randint(TURNS, (len(batch.x),), device=batch.x.device)
        data = {"x": rotate(batch.x, quarters), "index": batch.index}
        return uda.DomainBatch(step.model, batch.name, batch.role, data, step).features, quarters

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The objectives of the stage."""
        later = bool(self.scored)
        return {"known": self.source_known(step)} | (self.on_target(step) if later else self.on_source(step))

    def on_source(self, step: uda.Step) -> dict[str, Tensor]:
        """Class and relative rotation together, gathered about centres."""
        rotations, centring = {}, {}
        for name, batch in step.sources.items():
            turned, quarters = self.turned(step, batch)
            label = TURNS * (batch.y if batch.y.ndim == 1 else batch.y.argmax(1)) + quarters
            logits, v = self.source_head(batch.features, turned)
            rotations[name] = classification_loss(logits, label)
            with no_autocast(logits):
                own = self.centres[label]
                pull = (full(v) - own.detach()).square().sum(1).mean()
                follow = (full(v).detach() - own).square().sum(1).mean()  # centres learn at their full rate
                centring[name] = self.centre_weight * pull + follow
        out = {"rotation": self.rotation_weight * step.domain_mean(rotations)}
        return out | ({"centres": step.domain_mean(centring)} if self.centre_weight else {})

    def on_target(self, step: uda.Step) -> dict[str, Tensor]:
        """Unknown samples to class K + 1; rotation and certainty on known ones."""
        batch, known = step.target, self.known[step.target.index]
        u = self.unknown(batch.features)
        d = unknown_logit(batch.logits, u)
        turned, quarters = self.turned(step, batch)
        rotation = classification_loss(self.target_head(batch.features, turned)[0], quarters, reduction="none")
        share = self.unknown_weight / step.model.num_classes
        both = torch.cat([full(batch.logits), full(u)], 1)
        self.log_later(unknown_share=lambda: (d > 0).float().mean())
        return {
            "unknown": share * masked_mean(F.softplus(-d), ~known),
            "rotation": self.rotation_weight * masked_mean(rotation, known),
            "entropy": self.entropy_weight * masked_mean(entropy(both), known),
        }
