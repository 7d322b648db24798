"""Small pieces of the training loop: progress, seeding, checks, refresh, logging."""

from __future__ import annotations

import hashlib
import math
import random
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor

from uda.errors import UDAError
from uda.passes import Pools, walk

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.step import DomainBatch, Step

# --------------------------------------------------------------------------------------------- progress


def total_batches(model: UDA) -> int:
    """Batches of the whole training.

    Raises:
        UDAError: neither max_epochs nor max_steps bounds it, so that schedules have no end.
    """
    trainer = model.trainer
    bounds = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        bounds.append(trainer.max_epochs * trainer.num_training_batches)
    if trainer.max_steps >= 0 and model.automatic_optimization:
        bounds.append(trainer.max_steps * trainer.accumulate_grad_batches)
    bounds = [b for b in bounds if math.isfinite(b)]
    if not bounds:
        raise UDAError("Give trainer.max_epochs or trainer.max_steps: ramps and learning rate follow the progress.")
    return int(min(bounds))


def batches_done(trainer: L.Trainer) -> int:
    """Training batches finished, over all epochs."""
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def progress(model: UDA) -> float:
    """Share of the training that is done at the current batch, in [0, 1]."""
    if model._trainer is None or not model.trainer.training:
        return 1.0
    return min(model.trainer.fit_loop.epoch_loop.total_batch_idx / max(total_batches(model), 1), 1.0)


def total_steps(model: UDA) -> int:
    """Scheduler steps of the whole training."""
    estimate = model.trainer.estimated_stepping_batches
    if not math.isfinite(estimate):
        return 1  # unbounded: check_fit says so before the first step
    return max(1, int(estimate) // (1 if model.automatic_optimization else model.manual_accumulate))


def seed_step(base: int, index: int, rank: int, device: torch.device, salt: int = 0) -> None:
    """Seed the generators of Python, numpy and torch (CPU and ``device``) from (seed, step, rank).

    Only generators that are in use are seeded: ``torch.manual_seed`` costs a tenth of a small step.
    """
    name = f"{base},{index},{rank},{salt}".encode()
    seed = int.from_bytes(hashlib.blake2b(name, digest_size=4).digest(), "little")  # a tenth of numpy's SeedSequence
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def profile_of(trainer: L.Trainer) -> Any:
    """The profiler's span maker, or None when nobody profiles."""
    return None if isinstance(trainer.profiler, PassThroughProfiler) else trainer.profiler.profile


# ------------------------------------------------------------------------------------------------- steps


def concatenate(xs: list[Tensor], batches: list[DomainBatch]) -> Tensor:
    """Join the inputs of several domains.

    Raises:
        UDAError: different sample shapes.
    """
    shapes = {tuple(x.shape[1:]) for x in xs}
    if len(shapes) > 1:
        named = ", ".join(f"{b.name} {tuple(x.shape[1:])}" for b, x in zip(batches, xs, strict=True))
        raise UDAError(f"Samples of the domains have different shapes ({named}): use model.forward_mode: separate.")
    return torch.cat(xs)


def named(key: str, hook: str, found: Any) -> dict[str, Tensor]:
    """Check a plugin's objectives and put its key before their names."""
    if not isinstance(found, dict):
        raise UDAError(f"Plugin {key!r}: {hook} must return a dict of scalars, got {type(found).__name__}.")
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.ndim != 0:
            got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise UDAError(f"Plugin {key!r}: objective {name!r} of {hook} must be a scalar tensor, got {got}.")
    return {f"{key}/{name}": value for name, value in found.items()}


class FiniteCheck:
    """Finds the first objective that is not finite, without a device synchronisation in each step."""

    def __init__(self, model: UDA) -> None:
        self.on = model.check_finite
        self.every = 1 if model.device.type == "cpu" else max(1, model.trainer.log_every_n_steps)
        self.names: list[str] = []
        self.first: Tensor | None = None
        self.value: Tensor | None = None

    def see(self, step: Step) -> None:
        """Take note of a step's objectives; look at them now and then."""
        if not self.on:
            return
        if self.every == 1 and all(math.isfinite(v.item()) for v in step.objectives.values()):
            return
        names = list(step.objectives)
        values = torch.stack([v.detach().float() for v in step.objectives.values()])
        if self.every == 1:
            if not bool(values.isfinite().all()):
                self.names, self.value = names, values
                self.first = torch.where(values.isfinite(), -1, step.index)
                self.look()
            return
        if names != self.names:
            self.look()
            self.names, self.first, self.value = names, torch.full_like(values, -1).long(), values
        new = (self.first < 0) & ~values.isfinite()
        self.first = torch.where(new, step.index, self.first)
        self.value = torch.where(new, values, self.value)
        if step.index % self.every == 0:
            self.look()

    def look(self) -> None:
        """Raise if anything was not finite.

        Raises:
            UDAError: with step, objective and plugin.
        """
        if self.first is None or bool((self.first < 0).all()):
            return
        first = self.first.tolist()
        at = min(i for i in first if i >= 0)
        name = self.names[first.index(at)]
        owner = f"plugin {name.split('/')[0]!r}" if "/" in name else "the skeleton (source classification)"
        raise UDAError(
            f"Objective {name!r} of {owner} is {float(self.value[first.index(at)])} at step {at}. Lower the learning "
            "rate or the weight of that plugin, clip gradients (trainer.gradient_clip_val), and check the inputs. "
            "model.check_finite: false turns this check off."
        )


def logs_now(trainer: L.Trainer) -> bool:
    """Whether this batch is logged.

    By the count that loggers go by: batches with a step of the optimiser. ``global_step`` counts the steps, of which a
    method by hand may take several a batch, and can pass over the interval for ever.
    """
    done = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
    return bool(trainer.fast_dev_run) or done % trainer.log_every_n_steps == 0


def log_step(model: UDA, step: Step) -> None:
    """Objectives and diagnostics, at the trainer's logging interval only."""
    if not logs_now(model.trainer):
        for plugin in model.plugins.values():
            plugin.drop_diagnostics()
        return
    values: dict[str, Any] = {f"train/{name}": value.detach() for name, value in step.objectives.items()}
    for key, plugin in model.plugins.items():
        values |= {f"train/{key}/{name}": v for name, v in plugin.take_diagnostics().items()}
    model.log_dict(values, batch_size=1)
    model.logged = values  # the run's history takes it, with any logger or none
    total = torch.stack([v.detach().float() for v in step.objectives.values()]).sum()
    model.log("train/loss", total, prog_bar=True, batch_size=1)


def log_weights(model: UDA, weights: dict[str, Any]) -> None:
    """Weights that a combiner chose."""
    if logs_now(model.trainer):
        model.log_dict({f"train/weight/{n}": torch.as_tensor(w).float() for n, w in weights.items()}, batch_size=1)


def manual_step(model: UDA, step: Step) -> None:
    """Manual optimisation of one batch, scheduler stepping included."""
    from uda.gate import Objectives

    objectives = Objectives(step.objectives, step)
    _, done = model.hooks.first("optimise", step=step, objectives=objectives)
    if not done:
        model.manual_update(torch.stack([v.float() for v in step.objectives.values()]).sum())
    if step.updated:
        model.lr_schedulers().step()
    model.finish_step()


def refresh_if_due(model: UDA, batch_idx: int, index: int) -> None:
    """Whole-domain pass and ``refresh``, reusing pools that an evaluation has just seen with these weights."""
    if not model.hooks.filled("refresh"):
        return
    needs = model.data_needs
    if (index % needs.refresh_every if needs.refresh_every else batch_idx) != 0:
        return
    stamp, seen = model._pools
    model._pools = (-1, {})
    datamodule = getattr(model.trainer, "datamodule", None)
    if datamodule is None and needs.refresh:
        raise UDAError("A plugin asks for whole-domain passes (refresh): fit with a uda.DataModule.")

    def pool(name: str, role: str) -> Any:
        if stamp == index and name in seen:
            return seen[name]
        return walk(model, name, role, datamodule.pool_dataloader(name))

    sources = {n: pool(n, "source") for n in model.source_names} if "source" in needs.refresh else {}
    target = pool(model.target_name, "target") if "target" in needs.refresh else None
    if target is not None and (known := getattr(datamodule, "labelled", None)) is not None:
        target.y = known.to(model.device)
    seed_step(model.base_seed, index, 0, model.device, salt=1)  # equal on all ranks: what a refresh draws must be, too
    with torch.no_grad():
        model.hooks.all("refresh", model=model, bank=Pools(sources, target))
    for plugin in model.plugins.values():
        plugin.keep_diagnostics()


# -------------------------------------------------------------------------------------------- evaluation


def eval_domains(model: UDA, stage: str) -> list[tuple[str, str]]:
    """``(name, role)`` of each evaluation loader; without a data module the last one is the target."""
    datamodule = getattr(model.trainer, "datamodule", None)
    if hasattr(datamodule, "eval_domains"):
        return [(n, "target" if n == model.target_name else "source") for n in datamodule.eval_domains(stage)]
    loaders = model.trainer.test_dataloaders if stage == "test" else model.trainer.val_dataloaders
    count = len(loaders) if isinstance(loaders, (list, tuple)) else 1
    names = [*(model.source_names or [f"source{i}" for i in range(count - 1)])][: count - 1]
    return [*((n, "source") for n in names), (model.target_name, "target")]


def adapt(model: UDA, batch: DomainBatch) -> None:
    """Let the first plugin that adapts do so, and score its logits."""
    with torch.enable_grad():
        _, logits = model.hooks.first("adapt", model=model, batch=batch)
    if logits is not None:
        batch.views["x"].set_logits(logits.detach())
