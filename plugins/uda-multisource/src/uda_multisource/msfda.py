"""On Balancing Bias and Variance in Unsupervised Multi-Source-Free Domain Adaptation.

Shen, Bu and Wornell, ICML 2023.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

import uda
from uda.losses import classification_loss, domain_adversarial_loss, entropy, information_maximisation
from uda.nn import DomainDiscriminator, full, no_autocast
from uda_multisource.experts import Experts


def aggregate(logits: Tensor, steps: int = 200, lr: float = 0.1) -> Tensor:
    """Experts' weights ``[M]``, of sum 1, that make the mixture of their probabilities certain and even.

    Gradient steps from equal weights on ``mean H(p) - H(mean p)``, ``p = sum_i |w_i| p_i / sum |w|``.

    Args:
        logits: of the whole target ``[N, M, C]``; the authors take 20,000 steps.
    """
    with torch.enable_grad(), no_autocast(logits):
        probs = full(logits).detach().softmax(2)
        w = torch.ones(logits.shape[1], device=logits.device, dtype=probs.dtype, requires_grad=True)
        for _ in range(steps):
            share = w.abs() / w.abs().sum()
            mixture = torch.einsum("m,nmc->nc", share, probs).clamp_min(1e-12)
            (grad,) = torch.autograd.grad(-information_maximisation(mixture.log()), w)
            w = (w - lr * grad).detach().requires_grad_()
        return (w.abs() / w.abs().sum()).detach()


@torch.no_grad()
def prototype_probs(features: Tensor, logits: Tensor, bandwidth: float = 10.0, rounds: int = 2) -> Tensor:
    """Class probabilities of one expert by distance: ``softmax_k(-|f - c_k|^2 / (2 h))``, ``[N, C]``.

    Prototypes c_k are the means of the features labelled k; labels are those of the logits first, then of the last
    probabilities. A class without samples has probability 0.

    Args:
        features: ``[N, F]``; logits: ``[N, C]``.
    """
    with no_autocast(features):
        f, probs = full(features), full(logits).softmax(1)
        for _ in range(rounds):
            member = nn.functional.one_hot(probs.argmax(1), logits.shape[1]).to(f.dtype)
            count = member.sum(0)
            centres = member.T @ f / count.clamp_min(1)[:, None]
            distance = torch.cdist(f, centres).square().masked_fill(count == 0, torch.inf)
            probs = (-distance / (2 * bandwidth)).softmax(1)
        return probs


def masked_information(logits: Tensor, mask: Tensor) -> Tensor:
    """``mean H(p) - H(mean p)`` of the rows of a mask ``[B]``; 0 where there is none. ``[B, C]``."""
    with no_autocast(logits):
        share = mask.to(full(logits).dtype) / mask.sum().clamp_min(1)
        mean = (share[:, None] * full(logits).softmax(1)).sum(0)
        return (share * entropy(logits)).sum() + (mean * mean.clamp_min(1e-12).log()).sum()


class MSFDA(Experts):
    """Weights of the experts, labels of confident samples only, labelled and unlabelled ones alike (Shen et al. 2023).

    At the start of each epoch: weights of the experts by :func:`aggregate`; a label for each sample from the mixture of
    probabilities times the weighed :func:`prototype_probs`. Samples count as labelled where they are confident: at
    first those above half of the mean confidence, in the end all, their number growing with the run's progress, where
    the authors take 20 rounds. In a step, for each expert,
    ``label_weight (CE + CE of mixed samples) + information_weight (mean H(p) - H(mean p)) + adversarial_weight L_dom``
    over the labelled, where L_dom makes their features, of all experts side by side, like those of the unlabelled:
    features learn by the discriminator's loss with labels exchanged. The target takes the mixture's vote.

    Args:
        checkpoints, inputs, architectures: as in :class:`~uda_multisource.experts.Experts`.
        label_weight, adversarial_weight, information_weight: published 0.1, 1 and 1.
        mixup: parameter of the Beta distribution, 1 published; 0: no mixed samples.
        bandwidth: h of the prototypes, 10 published.
        weight_steps: of :func:`aggregate`.
        hidden: width of the discriminator's hidden layer.
    """

    mix = "probs"
    freeze_mixture = True
    reruns_backbone = True
    search_space: ClassVar[dict[str, Any]] = {"label_weight": (0.03, 1.0, "log"), "mixup": [0.0, 1.0]}
    labels: Tensor
    chosen: Tensor
    first: Tensor

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None = None,
        architectures: list[dict[str, Any]] | None = None,
        label_weight: float = 0.1,
        adversarial_weight: float = 1.0,
        information_weight: float = 1.0,
        mixup: float = 1.0,
        bandwidth: float = 10.0,
        weight_steps: int = 200,
        hidden: int = 256,
    ) -> None:
        super().__init__(checkpoints, inputs, architectures)
        if min(label_weight, adversarial_weight, information_weight, mixup) < 0 or bandwidth <= 0 or weight_steps < 0:
            raise uda.UDAError("MSFDA: weights, mixup, weight_steps must not be negative, bandwidth is positive.")
        self.label_weight, self.adversarial_weight = label_weight, adversarial_weight
        self.information_weight, self.mixup, self.bandwidth = information_weight, mixup, bandwidth
        self.weight_steps, self.hidden = weight_steps, hidden
        self.discriminator: DomainDiscriminator | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The experts, the discriminator, and room for the labels."""
        super().build(model)
        if self.discriminator is None:
            self.discriminator = DomainDiscriminator(model.feature_dim, self.hidden, 1, batch_norm=False)
            size = max(model.sizes.get(model.target_name, 0), 1)
            self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
            self.register_buffer("chosen", torch.zeros(size, dtype=torch.bool))
            self.register_buffer("first", torch.zeros((), dtype=torch.long))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Weights, labels, and which of them count."""
        features, head = bank.target.features, model.head
        logits = full(head.each(features))
        head.mixture.copy_(aggregate(logits, self.weight_steps).clamp_min(1e-6).log())
        weights, parts = head.weights, features.split(head.widths, 1)
        by_distance = sum(
            w * prototype_probs(f, z, self.bandwidth)
            for w, f, z in zip(weights, parts, logits.unbind(1), strict=True)
        )
        confidence, labels = (head.joined(logits).softmax(1) * by_distance).max(1)
        if not int(self.first):
            self.first.copy_((confidence >= confidence.mean() / 2).sum())
        count = int(self.first) + round((len(labels) - int(self.first)) * model.progress)
        self.labels.copy_(labels)
        self.chosen.zero_()
        self.chosen[confidence.topk(count).indices] = True

    @uda.hookimpl
    def pseudo_label(self, step: uda.Step) -> uda.PseudoLabels:
        """The batch's labels, and which of them count."""
        index = step.target.index
        return uda.PseudoLabels(self.labels[index], keep=self.chosen[index])

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Labels, mixed samples and information of each expert, and the domain objective."""
        model, target = step.model, step.target
        y, keep, features = target.pseudo.y, target.pseudo.keep, target.features
        mask = torch.ones_like(y, dtype=torch.float32) if keep is None else keep.float()
        each = model.head.each(features)
        found = {
            "labels": self.label_weight * self.supervised(each, y, mask),
            "information": self.information_weight * sum(masked_information(z, mask) for z in each.unbind(1)),
            "domain": self.adversarial_weight * self.domain(features, mask),
        }
        if self.mixup:
            share = torch.distributions.Beta(self.mixup, self.mixup).sample().to(target.x)
            order = torch.randperm(len(y), device=y.device)
            mixed = model.head.each(model.bottleneck(model.backbone(share * target.x + (1 - share) * target.x[order])))
            both = mask * mask[order]
            loss = share * self.supervised(mixed, y, both) + (1 - share) * self.supervised(mixed, y[order], both)
            found["mixup"] = self.label_weight * loss
        self.log_later(chosen=mask.mean())
        return found

    @staticmethod
    def supervised(each: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        """Cross-entropy over the labelled rows, summed over experts; ``[B, M, C]``, ``[B]``, ``[B]``."""
        scale = len(mask) / mask.sum().clamp_min(1)
        return scale * sum(classification_loss(z, y, weight=mask) for z in each.unbind(1))

    def domain(self, features: Tensor, mask: Tensor) -> Tensor:
        """Discriminator on constants, and features against it as it is: labelled 1 and unlabelled 0, then exchanged."""
        net = self.discriminator
        own = net(features.detach()).squeeze(1)
        frozen = {k: v.detach() for k, v in net.named_parameters()}
        fooled = functional_call(net, frozen, (features,)).squeeze(1)
        rest = 1 - mask
        return domain_adversarial_loss(own, own, mask, rest) + domain_adversarial_loss(fooled, fooled, rest, mask)
