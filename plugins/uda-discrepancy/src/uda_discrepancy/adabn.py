"""Adaptive Batch Normalization (Li et al., Revisiting Batch Normalization for Practical Domain Adaptation, 2016)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import uda
from uda.errors import check_choice
from uda.nn import gather_rows
from uda_discrepancy.domain_norm import domain_norms, separate_batchnorm


class Moments:
    """Count, mean and variance by channel of what a layer sees, added up batch by batch.

    Args:
        channels: C.
        device: of the sums.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = torch.zeros((), device=device)
        self.mean, self.squares = torch.zeros(channels, device=device), torch.zeros(channels, device=device)

    def add(self, x: Tensor) -> None:
        """Take in ``[B, C, ...]``."""
        x = x.detach().float().movedim(1, -1).flatten(0, -2)
        self.merge(self.count.new_tensor(float(len(x))), x.mean(0), x.var(0, correction=0) * len(x))

    def merge(self, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        """Join moments of other samples, ``squares`` about their own mean (Chan et al., 1979)."""
        total = (self.count + count).clamp_min(1)
        gap = mean - self.mean
        self.squares = self.squares + squares + gap.square() * self.count * count / total
        self.mean = self.mean + gap * count / total
        self.count = self.count + count

    def everywhere(self) -> Moments:
        """Moments of all ranks together."""
        parts = [gather_rows(v[None]) for v in (self.count, self.mean, self.squares)]
        joined = Moments(len(self.mean), self.mean.device)
        for count, mean, squares in zip(*parts, strict=True):
            joined.merge(count, mean, squares)
        return joined


@torch.no_grad()
def fit_statistics(model: nn.Module, norms: list[_BatchNorm], batches: Iterable[Tensor], forward: Any) -> None:
    """Set the running statistics of ``norms`` to the moments of what they see over all batches of all ranks.

    Within the pass each batch is normalised by its own statistics, so that deep layers see adapted inputs; the
    moments stored are those of all samples. Nothing else changes; dropout is off.

    Args:
        model: evaluated as a whole; norms: layers of it.
        batches: inputs; a batch of a single sample has no statistics and is left out.
        forward: called on each batch.
    """
    modes = {m: m.training for m in model.modules()}
    kept = [(n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone()) for n in norms]
    moments = {norm: Moments(norm.num_features, norm.running_mean.device) for norm in norms}
    hooks = [n.register_forward_pre_hook(lambda module, args: moments[module].add(args[0])) for n in norms]
    model.eval()
    for norm in norms:
        norm.train()
    try:
        for x in batches:
            if len(x) > 1:
                forward(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes.items():
            module.training = training
        for norm, (mean, var, tracked) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(tracked)
    for norm in norms:
        found = moments[norm].everywhere()
        if found.count > 1:
            norm.running_mean.copy_(found.mean)
            norm.running_var.copy_(found.squares / (found.count - 1))


class AdaBN(uda.Plugin):
    """Normalise the target by its own BatchNorm statistics (Li et al. 2016, algorithm 1).

    Scale and shift are shared and trained as they are without this plugin; only the statistics differ. No objective,
    no weight. Needs ``model.forward_mode: separate``.

    Args:
        statistics: ``pass``: those of the whole target training pool, from one pass over it before the target is
            first evaluated with new weights (the paper). The target is not needed in training. ``running``: moving
            averages over the target's training batches; no pass, but the weights move under the averages.
        per_source: with several sources statistics for each of them; otherwise for all together.
    """

    settings = ("closed", "partial", "open", "universal", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {"statistics": ["pass", "running"]}
    fresh: Tensor

    def __init__(self, statistics: str = "pass", per_source: bool = True) -> None:
        super().__init__()
        check_choice("AdaBN", "statistics", statistics, ("pass", "running"))
        self.statistics, self.per_source = statistics, per_source
        self.register_buffer("fresh", torch.tensor(False))  # statistics belong to the present weights

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Target batches for moving averages only."""
        return uda.DataNeeds(target=self.statistics == "running")

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Convert backbone and bottleneck."""
        separate_batchnorm(model, "AdaBN", affine=False, per_source=self.per_source)

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Show the target to its normalisation, or note that its statistics are out of date."""
        if self.statistics == "running":
            step.target.features  # noqa: B018  the forward moves the averages; nothing to do where it was made
        elif step.updated:
            self.fresh.fill_(False)

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """Bring the statistics up to date, before anything else sees a target batch."""
        if self.statistics == "pass" and not self.fresh:
            self.collect(model)

    def collect(self, model: uda.UDA) -> None:
        """Walk the target's training pool. All ranks together.

        Without a data module (a model used by itself) the statistics stay as they are.
        """
        trainer = model._trainer
        datamodule = getattr(trainer, "datamodule", None)
        if datamodule is None or trainer.sanity_checking:
            return

        def batches() -> Iterable[Tensor]:
            # shuffled: the order on disk is often that of the classes, and each batch is normalised by itself
            for batch in datamodule.pool_dataloader(model.target_name).shuffled(model.base_seed):
                batch = trainer.strategy.batch_to_device(batch, model.device)
                yield batch["x"][model.owned_rows(batch["index"])]

        def forward(x: Tensor) -> None:
            with trainer.precision_plugin.val_step_context():
                model.batch(x).features  # noqa: B018

        norms = [layer.norms["target"] for layer in domain_norms(model)]
        fit_statistics(model, norms, batches(), forward)
        self.fresh.fill_(True)
