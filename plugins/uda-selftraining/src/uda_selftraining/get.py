"""Generative Target Structure Debiasing for Domain Adaptation (GeT: Zhang & Lee, ICCV 2023)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.losses import soft_cross_entropy
from uda.nn import Bank, class_vectors, full, gather_rows, no_autocast
from uda.nn import ramp as ramp_factor

HEADS = ("g", "f")  # the classifier's posterior and that of the learnable prototypes
CHOICES = {
    "posterior": ("cosine", "logits"),
    "predict_by": ("classifier", "generative"),
    "prior_estimate": ("posterior", "cosine"),
    "absent": ("skip", "shrink"),
    "mass": ("batch", "domain"),
    "balance": ("uniform", "prior"),
}


def similarity(features: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """``cos(f_j, mu_c) / temperature``: ``[B, F]``, ``[C, F]`` -> ``[B, C]``, float32."""
    with no_autocast(features):
        features = F.normalize(full(features), dim=1)
        return features @ F.normalize(prototypes.to(features.dtype), dim=1).T / temperature


def balanced_labels(probs: Tensor, mass: Tensor) -> Tensor:
    """``Q(c | j)`` proportional to ``P(c | j) / sqrt(mass_c)`` (Zhang & Lee 2023, equation 6): ``[B, C]``.

    Args:
        probs: posteriors ``[B, C]``.
        mass: sum over samples of each class's posterior ``[C]``; a common factor does not matter.
    """
    q = probs / mass.clamp_min(1e-12).sqrt()
    return q / q.sum(1, keepdim=True)


def next_prior(prior: Tensor, estimate: Tensor, rate: float) -> Tensor:
    """``(1 - rate) prior + rate estimate`` ``[C]``, kept above 1e-6 and of sum 1 (equation 3)."""
    estimate = estimate.clamp_min(1e-6)
    moved = ((1 - rate) * prior + rate * estimate / estimate.sum()).clamp_min(1e-6)
    return moved / moved.sum()


def first_prototypes(classes: int, width: int, seed: int) -> Tensor:
    """Random unit vectors ``[C, F]``, equal on all processes."""
    return F.normalize(torch.randn(classes, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def next_prototypes(prototypes: Tensor, features: Tensor, label: Tensor, rate: float, skip: bool = True) -> Tensor:
    """``(1 - rate) mu_c + rate mean(f_j: label_j = c)`` ``[C, F]`` (equation 4).

    Args:
        prototypes: ``[C, F]``.
        features: ``[B, F]``; label: class ids ``[B]``.
        rate: share of the new mean.
        skip: leave the prototype of a class without samples as it is; otherwise its mean counts as zero.
    """
    chosen = F.one_hot(label, len(prototypes)).to(prototypes.dtype)
    count = chosen.sum(0)[:, None]
    moved = (1 - rate) * prototypes + rate * (chosen.T @ features.to(prototypes.dtype)) / count.clamp_min(1)
    return torch.where(count > 0, moved, prototypes) if skip else moved


class GeT(uda.Plugin):
    """Train the target on soft labels of generative classifiers with class priors and balanced structure.

    Two posteriors ``P_h(c | f) = softmax_c(log pi_c + cos(f, mu^h_c) / temperature)`` (equation 2), h = g with the
    classifier's weights and h = f with learnable prototypes, are trained on
    ``(1 - label_mix) Q_h + label_mix onehot(argmax_c p(c | f; mu, pi))`` (equations 6 and 9). ``mu`` and ``pi`` are
    memories that follow the target batches; the learnable prototypes start each epoch from ``mu``. Inference is the
    ordinary classifier. Works alone and beside an aligner (the paper: source-only and CDAN+E).

    The paper leaves six points open; the first choice named of each argument is the default.

    Args:
        weight: of both objectives (the paper: 1).
        embedding_weight: of the learnable prototypes' objective, relative to the classifier's.
        temperature: of the cosine (the paper: 1). At 1 no posterior gets above ``1 / (1 + (C - 1) exp(-2))``: the
            objective is a steady pull to the memories. Small values (0.05 to 0.1) let posteriors be certain.
        label_mix: share of the memories' hard label in the soft labels (gamma_Q).
        prior_rate: share of a batch's estimate in the class prior (gamma_pi). 0 keeps the prior uniform.
        prototype_rate: share of a batch's class mean in the memory (gamma_mu, as printed: 0.9 on the *new* mean).
        prior_estimate: what equation 3 averages over the batch: ``posterior``, which is a distribution; ``cosine``
            as printed, ``cos / temperature``, which may be negative, cut at 1e-6 and normalised.
        absent: prototype of a class that no sample of the batch is assigned to: ``skip`` leaves it, ``shrink``
            counts its mean as zero.
        mass: the column sum of equation 6: ``batch`` over the samples of the step, on all processes; ``domain`` over
            the whole target, from the latest posterior of each sample.
        balance: what the labels' shares are drawn to: ``uniform``, equation 6; ``prior``, whose ``Q`` is proportional
            to ``P sqrt(pi_c / mass_c)``, so that shares at the estimated prior stay. Not in the paper.
        posterior: the trained posterior P_g: ``cosine`` as in equation 2, on the classifier's weights without bias;
            ``logits``, ``softmax(log pi + z)`` of the ordinary logits z (with ``prior_rate`` 0 the plain softmax).
        predict_by: who predicts: ``classifier`` is the ordinary one; ``generative`` is P_g, with the class prior.
        ramp: growth of the weight over the run's progress: ``none`` (the paper), ``linear`` (the code that it
            builds on), ``warm_start``.
    """

    settings = ("closed", "partial", "multi-source", "semi-supervised")
    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.1, 3.0, "log"), "temperature": (0.05, 1.0, "log"), "label_mix": (0.1, 0.5),
        "prior_rate": (1e-3, 0.1, "log"), "ramp": ["none", "linear"],
    }  # fmt: skip

    prior: Tensor
    prototypes: Tensor

    def __init__(
        self,
        weight: float = 1.0,
        embedding_weight: float = 1.0,
        temperature: float = 1.0,
        label_mix: float = 0.2,
        prior_rate: float = 0.01,
        prototype_rate: float = 0.9,
        prior_estimate: str = "posterior",
        absent: str = "skip",
        mass: str = "batch",
        balance: str = "uniform",
        posterior: str = "cosine",
        predict_by: str = "classifier",
        ramp: str = "none",
    ) -> None:
        super().__init__()
        if weight < 0 or embedding_weight < 0 or temperature <= 0:
            raise uda.UDAError("GeT: weights must not be negative, and temperature must be positive.")
        for name in ("label_mix", "prior_rate", "prototype_rate"):
            if not 0 <= locals()[name] <= 1:
                raise uda.UDAError(f"GeT: {name} is a share in [0, 1], not {locals()[name]}.")
        for name, known in CHOICES.items():
            check_choice("GeT", name, locals()[name], known)
        ramp_factor(ramp, 0.0)  # an unknown ramp is refused here
        self.weight, self.embedding_weight, self.temperature, self.ramp = weight, embedding_weight, temperature, ramp
        self.label_mix, self.prior_rate, self.prototype_rate = label_mix, prior_rate, prototype_rate
        self.prior_estimate, self.absent, self.mass, self.posterior = prior_estimate, absent, mass, posterior
        self.balance, self.predict_by = balance, predict_by
        self.embedding: nn.Parameter | None = None
        self.seen: Bank | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Memories: random unit prototypes (equal on all processes) and the uniform prior."""
        if self.embedding is not None:
            return
        classes, width = model.num_classes, model.feature_dim
        start = first_prototypes(classes, width, model.base_seed)
        self.register_buffer("prototypes", start)
        self.register_buffer("prior", torch.full((classes,), 1 / classes))
        self.embedding = nn.Parameter(start.clone())
        if self.mass == "domain":
            if not (size := model.sizes.get(model.target_name, 0)):
                raise uda.UDAError("GeT: mass 'domain' needs the size of the target; use mass 'batch'.")
            self.seen = Bank(size, **dict.fromkeys(HEADS, classes))

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """At the start of an epoch the learnable prototypes become those of the memory, without momentum."""
        if step.batch_idx == 0:
            self.embedding.data.copy_(self.prototypes)
            for optimizer in running_optimizers(step.model):
                optimizer.state.pop(self.embedding, None)

    def log_posteriors(self, model: uda.UDA, features: Tensor, logits: Tensor) -> dict[str, Tensor]:
        """``log P_g`` and ``log P_f`` ``[B, C]`` up to a constant of the sample, with gradient."""
        log_prior = self.prior.log()
        if self.posterior == "cosine":
            classifier = similarity(features, class_vectors(model.head, "GeT"), self.temperature)
        else:
            classifier = full(logits)
        return {"g": log_prior + classifier, "f": log_prior + similarity(features, self.embedding, self.temperature)}

    @torch.no_grad()
    def soft_labels(self, features: Tensor, probs: dict[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
        """Labels ``[B, C]`` of both posteriors (equation 9). All processes call this together."""
        nearest_one = (self.prior.log() + similarity(features, self.prototypes, self.temperature)).argmax(1)
        hard = F.one_hot(nearest_one, len(self.prior))
        mass = self.class_mass(probs, index)
        if self.balance == "prior":
            mass = {h: m / self.prior for h, m in mass.items()}
        return {
            h: (1 - self.label_mix) * balanced_labels(p, mass[h]) + self.label_mix * hard.to(p.dtype)
            for h, p in probs.items()
        }

    def class_mass(self, probs: dict[str, Tensor], index: Tensor | None) -> dict[str, Tensor]:
        """Sum of each class's posterior ``[C]`` over the step's samples of all processes, or over the target."""
        mass = {h: gather_rows(p.sum(0, keepdim=True)).sum(0) for h, p in probs.items()}
        if self.seen is not None:  # what the memory holds of all other samples
            others = torch.ones(len(self.seen), dtype=torch.bool, device=self.prior.device)
            others[gather_rows(index)] = False
            mass = {h: m + others.to(m.dtype) @ self.seen.read(h) for h, m in mass.items()}
        return mass

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Cross-entropy of both posteriors on their soft labels (equation 10)."""
        target = step.target
        logs = self.log_posteriors(step.model, target.features, target.logits)
        probs = {h: z.detach().softmax(1) for h, z in logs.items()}
        labels = self.soft_labels(target.features.detach(), probs, target.index)
        target.cache[f"{self.key}.probs"] = probs
        weight = self.weight * ramp_factor(self.ramp, step.progress)
        self.log_later(
            prior_entropy=lambda: -(self.prior * self.prior.log()).sum(), certainty=probs["g"].amax(1).mean()
        )
        return {
            "classifier": weight * soft_cross_entropy(logs["g"], labels["g"]),
            "embedding": weight * self.embedding_weight * soft_cross_entropy(logs["f"], labels["f"]),
        }

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Prior and prototypes follow the samples of all processes (equations 3 and 4)."""
        target = step.target
        probs = target.cache[f"{self.key}.probs"]
        features, posterior = gather_rows(full(target.features)), gather_rows(probs["g"])
        estimate = posterior
        if self.prior_estimate == "cosine":
            estimate = similarity(features, class_vectors(step.model.head, "GeT"), self.temperature)
        self.prior.copy_(next_prior(self.prior, estimate.mean(0), self.prior_rate))
        self.prototypes.copy_(
            next_prototypes(
                self.prototypes, features, posterior.argmax(1), self.prototype_rate, self.absent == "skip"
            )
        )
        if self.seen is not None:
            self.seen.write(target.index, **probs)

    @uda.hookimpl
    def predict(self, model: uda.UDA, batch: uda.DomainBatch) -> uda.Prediction | None:
        """P_g of a target batch, if that is wanted; a source keeps its own class shares."""
        if self.predict_by == "classifier" or batch.role == "source":
            return None
        score, label = self.log_posteriors(model, batch.features, batch.logits)["g"].softmax(1).max(1)
        return uda.Prediction(label, score)


def running_optimizers(model: uda.UDA) -> list[torch.optim.Optimizer]:
    """The optimisers of a running fit; none outside of one."""
    trainer = getattr(model, "_trainer", None)
    return list(trainer.optimizers) if trainer is not None else []
