"""ToAlign: task-oriented alignment (Wei et al., NeurIPS 2021)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import uda
from uda.losses import entropy_weights
from uda.nn import full, no_autocast
from uda_adversarial.adversary import Adversary


def task_weights(head: nn.Module, features: Tensor, y: Tensor) -> Tensor:
    """Gradient ``d z_y / d f`` ``[B, F]`` of the true class's logit; of a linear head the weights of that class.

    Args:
        features: ``[B, F]``; y: class ids ``[B]``, or distributions ``[B, C]`` for the gradient of ``sum_c y_c z_c``.
    """
    with torch.enable_grad():
        leaf = features.detach().requires_grad_()
        logits = head(leaf).float()
        chosen = logits.gather(1, y.long()[:, None]) if y.ndim == 1 else logits * y
        (weights,) = torch.autograd.grad(chosen.sum(), leaf)
    return weights


def task_relevant(features: Tensor, weights: Tensor, detach_scale: bool = False) -> Tensor:
    """``f_p = s f * w`` with ``s = |f| / |f * w|``, the part of the features that the task sees, at its old energy.

    Wei et al. 2021. Where ``f * w`` vanishes, so does the result.

    Args:
        features: ``[B, F]``; weights: ``[B, F]``.
        detach_scale: take the scale s as a constant.
    """
    with no_autocast(features):
        features, product = full(features), full(features) * full(weights)
        eps = torch.finfo(torch.float32).tiny
        scale = (features.square().sum(1) / product.square().sum(1).clamp_min(eps)).clamp_min(eps).sqrt()[:, None]
        scale = torch.where(product.square().sum(1, keepdim=True) > eps, scale, 0.0)
        return product * (scale.detach() if detach_scale else scale)


class ToAlign(Adversary):
    """Align the target with that part of the source features only that serves classification.

    The discriminator sees ``h(f_p)`` of source and ``h(f)`` of target, with ``f_p = s f_s * dz_y/df`` (Wei et al. 2021)
    and ``h`` the class probabilities, as in the paper's baseline, or the features as they are. What the head says of
    the source's label is a constant of the step. The extra heads of the paper's second baseline, HDA, are not here.

    Args:
        predictions: the discriminator sees class probabilities (the paper); else features.
        entropy: weigh each sample by ``1 + exp(-H)``, as in CDAN+E (on in the published settings).
        detach_scale: no gradient through the scale s (not told by the equations).
        others: as in :class:`~uda_adversarial.adversary.Adversary`.
    """

    search_space: ClassVar[dict[str, Any]] = {**Adversary.search_space, "predictions": [True, False]}

    def __init__(
        self,
        predictions: bool = True,
        entropy: bool = True,
        detach_scale: bool = False,
        weight: float = 1.0,
        gamma: float = 10.0,
        reversal: float = 1.0,
        hidden: int = 1024,
        layers: int = 2,
        batch_norm: bool = True,
        dropout: float = 0.0,
        lr_scale: float = 1.0,
    ) -> None:
        super().__init__(weight, gamma, reversal, hidden, layers, batch_norm, dropout, lr_scale)
        self.predictions, self.entropy, self.detach_scale = predictions, entropy, detach_scale

    def input_size(self, model: uda.UDA) -> int:
        """Number of classes, or width of the features."""
        return model.num_classes if self.predictions else model.feature_dim

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The domain objective on task-relevant source features."""
        head, features = step.model.head, step.pooled("features")
        weights = task_weights(head, features, step.pooled("y"))
        source, target = task_relevant(features, weights, self.detach_scale), step.target.features
        certainty: dict[str, Any] = {}
        if self.predictions or self.entropy:
            on_source, on_target = head(source), step.target.logits
            if self.entropy:
                certainty = {"source_weight": entropy_weights(on_source), "target_weight": entropy_weights(on_target)}
            if self.predictions:
                source, target = on_source.float().softmax(1), on_target.float().softmax(1)
        return {"domain": self.adversarial(step, source.to(target.dtype), target, **certainty)}
