"""How much of each source class the target seems to hold, from predictions alone, and weights by it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

import uda
from uda.errors import check_choice
from uda.losses import class_distributions
from uda.nn import full

NORMALISE = ("max", "sum", "mean")
MEANS = ("weighted", "batch")


def class_weights(logits: Tensor, temperature: float = 1.0, normalise: str = "max") -> Tensor:
    """``gamma_c``, the mean of ``softmax(z / T)_c`` over the target (Cao et al., ECCV 2018, equation 3).

    Args:
        logits: of the whole target ``[N, C]``.
        temperature: T; below 1 it draws the mean towards the histogram of the predicted classes.
        normalise: divide by the largest one (``max``), so that the surest class weighs 1; by the sum (``sum``); or by
            the mean over classes (``mean``).

    Returns:
        ``[C]``, float32 (float64 for float64 logits).
    """
    gamma = (full(logits) / temperature).softmax(1).mean(0)
    by = {"max": gamma.amax(), "sum": gamma.sum(), "mean": gamma.mean()}
    return gamma / by[normalise].clamp_min(torch.finfo(gamma.dtype).tiny)


class ClassEstimate(uda.Plugin):
    """Base: a weight of each source class, estimated from the predictions over the whole target now and then.

    A subclass calls :meth:`set_estimate` in its constructor and :meth:`make_estimate` in its ``build``.
    """

    settings = ("closed", "partial", "multi-source")
    class_weight: Tensor

    def set_estimate(self, temperature: float, normalise: str, warmup: float, every: int) -> None:
        """Check and keep the arguments that :class:`ClassWeights` explains.

        Raises:
            UDAError: values that cannot be.
        """
        name = type(self).__name__
        check_choice(name, "normalise", normalise, NORMALISE)
        if temperature <= 0 or not 0 <= warmup <= 1 or every < 0:
            raise uda.UDAError(
                f"{name}: temperature must be positive, warmup a share of the run in [0, 1], and every 0 or more steps."
            )
        self.temperature, self.normalise, self.warmup, self.every = temperature, normalise, warmup, every

    def make_estimate(self, classes: int) -> None:
        """All classes alike, until the first look at the target."""
        if "class_weight" not in self._buffers:
            start = torch.full((classes,), 1 / classes) if self.normalise == "sum" else torch.ones(classes)
            self.register_buffer("class_weight", start)

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The whole target, each epoch or every so many steps."""
        return uda.DataNeeds(refresh={"target"}, refresh_every=self.every)

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Look at the whole target, unless it is too early in the run."""
        if model.progress >= self.warmup:
            self.class_weight.copy_(class_weights(bank.target.logits, self.temperature, self.normalise))

    def log_classes(self) -> None:
        """``effective_classes``: ``(sum w)^2 / sum w^2``, the number of classes if all weighed 1 or 0."""
        w = self.class_weight
        self.log_later(effective_classes=lambda: w.sum().square() / w.square().sum().clamp_min(1e-12))

    def sample_weight(self, y: Tensor) -> Tensor:
        """Weight of each sample ``[B]`` by its class id ``[B]`` or class distribution ``[B, C]``."""
        return class_distributions(y, len(self.class_weight), self.class_weight.dtype) @ self.class_weight


class ClassWeighted(ClassEstimate):
    """Base: the source classification is weighed by class as well."""

    def set_estimate(
        self, temperature: float, normalise: str, warmup: float, every: int, mean: str = "weighted"
    ) -> None:
        """As above, with ``mean`` as :class:`ClassWeights` explains it."""
        super().set_estimate(temperature, normalise, warmup, every)
        check_choice(type(self).__name__, "mean", mean, MEANS)
        self.mean = mean

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Weights of the source samples; they multiply those of another plugin."""
        for batch in step.sources.values():
            weight = self.sample_weight(batch.y)
            if self.mean == "weighted":
                weight = weight / weight.mean().clamp_min(torch.finfo(weight.dtype).tiny)
            batch.weight = weight if batch.weight is None else batch.weight * weight
        self.log_classes()


class ClassWeights(ClassWeighted):
    """Weigh the source classification by class: classes that the target hardly predicts count little.

    The half of PADA that needs no discriminator, to go with methods that have no weights of their own, such as
    self-supervised side tasks (Bucci et al., TPAMI 2021). Trains nothing itself. The weights come from the model's
    predictions over the whole target; no target label and no number of classes has a part.

    Args:
        temperature: of the softmax; 1 is the paper's, 0.1 that of a common re-implementation.
        normalise: ``max``: the largest weight is 1 (PADA); ``sum``: they sum to 1 (BA3US); ``mean``: their mean is 1.
        warmup: share of the run in which all classes weigh alike, while the classifier knows nothing yet.
        every: steps between two looks at the target; 0: at the start of each epoch.
        mean: of the weighted cross-entropy over a batch: ``weighted``, over the sum of the weights; ``batch``, over
            the samples (the paper's equation), which shrinks the objective by the share of what is weighed down.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "temperature": [0.1, 0.3, 1.0], "warmup": [0.05, 0.1, 0.2],
    }  # fmt: skip

    def __init__(
        self,
        temperature: float = 1.0,
        normalise: str = "max",
        warmup: float = 0.1,
        every: int = 0,
        mean: str = "weighted",
    ) -> None:
        super().__init__()
        self.set_estimate(temperature, normalise, warmup, every, mean)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Weights for the model's classes."""
        self.make_estimate(model.num_classes)
