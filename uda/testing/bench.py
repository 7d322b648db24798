"""Short trainings of a plugin on the tiny task, with everything fixed but what a check varies."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn

from uda.data import DataModule
from uda.described import describe
from uda.discovery import make_plugin
from uda.hooks import hooks_of
from uda.module import UDA
from uda.nn import MLP, SmallCNN
from uda.optim import Constant
from uda.plugin import Plugin
from uda.running import FiniteCheck
from uda.step import Step
from uda.testing.task import LabelUser, MeanGap, NeutralPartner, TinyTask

KEY = "checked"  # key of the plugin under test
EPOCHS, STEPS, BATCH = 2, 4, 8
SKELETON = ("backbone", "bottleneck", "head")


class _Watch(FiniteCheck):
    """Shows each step to an onlooker while the objectives still have their graph."""

    def __init__(self, model: UDA, onlooker: Callable[[Step], None]) -> None:
        super().__init__(model)
        self.onlooker = onlooker

    def see(self, step: Step) -> None:
        super().see(step)
        self.onlooker(step)


class Observed(UDA):
    """The skeleton, with an onlooker on each training step."""

    onlooker: Callable[[Step], None] | None = None

    def on_train_start(self) -> None:
        """Put the onlooker in the place where objectives are checked."""
        super().on_train_start()
        if self.onlooker is not None:
            self._finite = _Watch(self, self.onlooker)


def fast_optimizer(params: Any) -> torch.optim.Optimizer:
    """SGD with momentum at a rate that shows within eight steps."""
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


@dataclass
class Bench:
    """A plugin class with its arguments, and short runs of it.

    Attributes:
        cls: the class; ``init_args``: its plain constructor arguments.
        partners: other plugins of the runs, in their plain form, called after the checked one.
        kind: kind of inputs; ``sources``: number of source domains.
        model_args: of :class:`uda.UDA`; ``data_args``: of :class:`uda.data.DataModule`.
        backbone: makes the network of all runs, also of those without BatchNorm; None: a small one.
        folder: for checkpoints.
    """

    cls: type[Plugin]
    init_args: dict[str, Any] = field(default_factory=dict)
    partners: dict[str, Any] = field(default_factory=dict)
    kind: Literal["features", "images"] = "features"
    sources: int = 1
    model_args: dict[str, Any] = field(default_factory=dict)
    data_args: dict[str, Any] = field(default_factory=dict)
    backbone: Callable[[], nn.Module] | None = None
    folder: str = field(default_factory=tempfile.gettempdir)
    hooks: list[str] = field(init=False)
    kept: Any = field(init=False, default=None, repr=False)  # of uda.testing.undisturbed

    def __post_init__(self) -> None:
        self.hooks = hooks_of(self.cls)
        self.partners = {k: describe(make_plugin(p)) for k, p in self.partners.items()}
        objectives = {"align_features", "refine_classifier"} & set(self.hooks)
        if not self.partners:
            if "weigh_objectives" in self.hooks:
                self.partners = {"partner": describe(MeanGap())}
            elif "pseudo_label" in self.hooks and not objectives:
                self.partners = {"partner": describe(LabelUser())}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}  # other processes make their own run

    @property
    def manual(self) -> bool:
        """Whether the plugin steps the optimisers itself."""
        return self.cls.manual

    def plugin(self, **changed: Any) -> Plugin:
        """A fresh plugin."""
        return self.cls(**{**self.init_args, **changed})

    def model(
        self, plugin: Plugin | None = None, *, without: bool = False, plain: bool = False, **changed: Any
    ) -> Observed:
        """A fresh model from fixed random numbers, not built yet.

        Args:
            plugin: the checked plugin (None: a fresh one).
            without: leave the checked plugin out, but load the same data.
            plain: no BatchNorm and no dropout, so that samples do not see each other.
            changed: further arguments of the model.
        """
        torch.manual_seed(1)
        if plugin is None:
            plugin = self.neutral() if without else self.plugin()
        plugins = {KEY: plugin, **{k: make_plugin(p) for k, p in self.partners.items()}}
        torch.manual_seed(2)  # what a plugin drew must not move the skeleton's weights
        if self.backbone is not None:
            backbone = self.backbone()
        elif plain or self.kind == "features":
            backbone = MLP([16], batch_norm=not plain)
        else:
            backbone = SmallCNN(1, (4, 8))
        given = {
            "bottleneck": 8,
            "bottleneck_norm": "layer" if plain else "batch",
            "optimizer": fast_optimizer,
            "schedule": Constant(),
            "scores": [],  # most of the time of a short run; `lifecycle` has them
            **self.model_args,
            **changed,
        }
        model = Observed(given.pop("backbone", backbone), plugins, **given)
        model.base_seed = 2  # whatever PL_GLOBAL_SEED says
        return model

    def neutral(self) -> Plugin:
        """A plugin of the same data needs that does nothing."""
        plugin = self.plugin()
        model = self.built(plugin)
        needs = dict(model.hooks.each("data_needs", model=model)).get(KEY)
        if needs is None:
            return NeutralPartner()
        return NeutralPartner(
            needs.source, needs.target, needs.held_out, sorted(needs.views), sorted(needs.source_views),
            needs.class_balanced, sorted(needs.refresh), needs.refresh_every,
        )  # fmt: skip

    def data(self, permute: int = 0) -> DataModule:
        """A fresh data module; ``permute`` shuffles the target's labels."""
        task = TinyTask(self.kind, self.sources, permute=permute)
        given = {
            "batch_size": BATCH,
            "epoch_steps": STEPS,
            "held_out_fraction": 0.25,
            "seed": 5,
            "any_method": True,  # the task is a closed set, unless data_args name classes
            **self.data_args,
        }
        *sources, target = task.domains()
        return DataModule(task, source=sources, target=target, **given)

    def built(self, plugin: Plugin | None = None, **options: Any) -> Observed:
        """A model that knows the sizes of the task."""
        spec = self.data().spec
        return self.model(plugin, **spec, **options)

    def trainer(self, **options: Any) -> L.Trainer:
        """A quiet trainer on one CPU process."""
        given = {
            "max_epochs": EPOCHS,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "inference_mode": False,
            "default_root_dir": self.folder,
            **options,
        }
        return L.Trainer(**given)

    def train(
        self, model: Observed, *, permute: int = 0, ckpt_path: str | None = None, **options: Any
    ) -> L.Trainer:
        """Fit the model; gives the trainer."""
        trainer = self.trainer(**options)
        trainer.fit(
            model, self.data(permute), ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {})
        )
        return trainer


def state_of(model: nn.Module, parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Detached copies of all parameters and buffers, also of those that no checkpoint holds."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {k: v.detach().clone() for k, v in state.items() if not parts or k.split(".")[0] in parts}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names whose values are not equal bit for bit (NaN equals NaN)."""
    wrong = sorted(one.keys() ^ other.keys())
    for k in one.keys() & other.keys():
        a, b = one[k], other[k]
        if a.shape != b.shape or a.dtype != b.dtype or not torch.equal(a.nan_to_num(), b.nan_to_num()):
            wrong.append(k)
    return sorted(wrong)


def largest_gap(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference over the floating-point tensors that both have in one shape."""
    gaps = [
        float((one[k] - other[k]).abs().max())
        for k in one.keys() & other.keys()
        if one[k].is_floating_point() and one[k].shape == other[k].shape and one[k].numel()
    ]
    return max(gaps, default=0.0)


@contextmanager
def quiet() -> Iterator[None]:
    """No chatter of trainers, and the caller's random numbers as they were."""
    import random

    import numpy as np

    loggers = [logging.getLogger(n) for n in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    python, numpy = random.getstate(), np.random.get_state()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\..*")
            warnings.filterwarnings("ignore", message=".*(LeafSpec|does not have many workers).*")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
