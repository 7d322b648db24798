"""The skeleton: backbone, bottleneck, classifier and plugins. Everything that is a method lives in a plugin."""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from uda import checkpointing, checks, objectives, running
from uda.discovery import make_plugin
from uda.errors import UDAError
from uda.evaluation import EvaluationLoop
from uda.gate import Level
from uda.hooks import Hooks, require_manual
from uda.manual import ManualUpdates
from uda.nn import Bottleneck, domain_context, domain_feature_size, make_backbone, make_head, use_channels_last
from uda.optim import InverseDecay, Schedule, build_optimizer, build_scheduler, default_optimizer, skeleton_groups
from uda.plugin import DataNeeds, Plugin
from uda.selection.shared import ScoreOptions
from uda.step import DomainBatch, Step


class UDA(EvaluationLoop):
    """Unsupervised domain adaptation as a ``LightningModule`` whose methods are plugins.

    Args:
        backbone: ``nn.Module`` giving ``[B, F]``, or a name such as ``timm:resnet50``, ``torchvision:resnet18``,
            ``small_cnn``, ``identity``.
        plugins: methods by key, in call order: objects, names, or ``{class_path, init_args}``.
        bottleneck: width of Linear-norm-ReLU between backbone and classifier; 0 for none.
        bottleneck_norm: ``batch``, ``layer`` or ``none``.
        bottleneck_dropout: dropout after the bottleneck.
        head: ``linear``, ``weight_norm`` or ``cosine`` classifier.
        forward_mode: ``joint``: one forward of all domains of a step, with common BatchNorm statistics;
            ``separate``: one a domain.
        label_smoothing: of the source cross-entropy.
        optimizer: optimiser by class path, as in any LightningCLI.
        schedule: learning-rate factor over the run's progress.
        backbone_lr_scale: learning rate of the backbone relative to new layers (the field: 0.1 when pretrained).
        init_from: checkpoint to take the weights of backbone, bottleneck and head from; nothing else of it.
        gate_level: where :meth:`~uda.gate.Objectives.gram` takes gradients by default.
        manual_clip: gradient norm for manual methods (0: none); others use the trainer's ``gradient_clip_val``.
        manual_accumulate: batches a step for manual methods; others use ``accumulate_grad_batches``.
        compile_backbone: run the backbone through ``torch.compile``; ``channels_last``: images channels last.
        check_finite: stop at the first NaN or infinite objective, naming step, objective and plugin.
        scores, score_options: label-free scores (None: cheap ones), their cap, seed, thresholds (docs/selection.md).
        num_classes, class_names, input_shape, input_shapes, sizes, source_names, target_name, multi_label,
            missing_classes: filled in from the data module; to be given only where there is none (input_shapes and
            missing_classes, ids by source, only where domains differ).
    """

    def __init__(
        self,
        backbone: nn.Module | str,
        plugins: dict[str, Plugin] | None = None,
        bottleneck: int = 256,
        bottleneck_norm: str = "batch",
        bottleneck_dropout: float = 0.0,
        head: str = "linear",
        forward_mode: str = "joint",
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = default_optimizer,
        schedule: Schedule = InverseDecay(),
        backbone_lr_scale: float = 1.0,
        init_from: str | None = None,
        gate_level: Level = "features",
        manual_clip: float = 0.0,
        manual_accumulate: int = 1,
        compile_backbone: bool = False,
        channels_last: bool = False,
        check_finite: bool = True,
        scores: list[str] | None = None,
        score_options: dict[str, float] | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        input_shape: list[int] | None = None,
        input_shapes: dict[str, list[int]] | None = None,
        sizes: dict[str, int] | None = None,
        source_names: list[str] | None = None,
        target_name: str | None = None,
        multi_label: bool | None = None,
        missing_classes: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__()
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        checks.check_arguments(arguments)
        arguments["plugins"] = plugins = {k: make_plugin(p) for k, p in (plugins or {}).items()}
        checkpointing.remember(self, arguments)
        self.backbone = use_channels_last(make_backbone(backbone)) if channels_last else make_backbone(backbone)
        self.plugins = nn.ModuleDict(checks.keyed(plugins))
        self.hooks = Hooks(plugins)
        require_manual(plugins.values())
        self.gate_level, self.label_smoothing, self.check_finite = gate_level, label_smoothing, check_finite
        self.score_options = ScoreOptions.make(scores, score_options)
        self.manual_clip, self.manual_accumulate = manual_clip, manual_accumulate
        self._optimizer, self._schedule, self._backbone_lr_scale = optimizer, schedule, backbone_lr_scale
        self._compile = compile_backbone
        self.init_from = init_from  # until its weights are taken; None from then on, and in a run that resumed
        self.started = False  # from trained weights: of init_from, of a checkpoint, or that a plugin brings
        self._head_spec = (bottleneck, bottleneck_norm, bottleneck_dropout, head)
        self.joint_forward = forward_mode == "joint" and getattr(self.backbone, "joint_forward", True)
        self.automatic_optimization = not any(p.manual for p in plugins.values())
        self.reruns_backbone = any(p.reruns_backbone for p in plugins.values())
        self.base_seed = int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed() % 2**31))
        self.num_classes, self.class_names = num_classes, class_names
        self.input_shape, self.input_shapes = input_shape, input_shapes
        self.sizes, self.source_names = dict(sizes or {}), list(source_names or [])
        self.target_name, self.multi_label = target_name or "target", multi_label
        self.missing_classes = dict(missing_classes or {})
        self.feature_dim: int | None = None
        self._pools: tuple[int, dict[str, Any]] = (-1, {})  # pools seen by the last evaluation, and when
        self._step: Step | None = None
        if num_classes is not None and input_shape is not None:
            self._build()

    # ------------------------------------------------------------------------------------- construction

    def configure_model(self) -> None:
        """Build heads and plugins, with sizes from the data module where they were not given. Idempotent."""
        trainer = self._trainer
        if trainer is not None:
            checks.take_spec(self, getattr(trainer, "datamodule", None))
        if self.feature_dim is None:
            if self.num_classes is None or self.input_shape is None:
                raise UDAError("num_classes and input_shape are unknown: fit with a uda.DataModule, or give both.")
            self._build()
        if trainer is not None and self.init_from:
            checkpointing.init_from(self, self.init_from)
            self.init_from = None

    def _build(self) -> None:
        width, norm, dropout, head = self._head_spec
        shapes = self.input_shapes or {self.target_name: self.input_shape}
        size = domain_feature_size(self.backbone, shapes, self.target_name)
        self.bottleneck = Bottleneck(size, width, norm=norm, dropout=dropout) if width else nn.Identity()
        self.feature_dim = width or size
        self.head = make_head(head, self.feature_dim, self.num_classes)
        if self._compile:
            self.backbone.compile()
        self.hooks.all("build", model=self)

    @functools.cached_property
    def data_needs(self) -> DataNeeds:
        """Union of what the plugins need; plugins that do not say need source and target."""
        told = dict(self.hooks.each("data_needs", model=self))
        return DataNeeds.union(told.get(key, DataNeeds()) for key in self.plugins)

    def configure_optimizers(self) -> Any:
        """One optimiser over the groups of skeleton and plugins; the schedule follows the run's progress."""
        optimizer = build_optimizer(self._optimizer, self.parameter_groups())
        scheduler = build_scheduler(optimizer, self._schedule, running.total_steps(self))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Optimiser groups by name: backbone, bottleneck, head, what plugins claim, and the rest of each plugin."""
        return skeleton_groups(self)

    # ------------------------------------------------------------------------------------------- forward

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, C]`` of target inputs."""
        return self.batch(x).logits

    def batch(self, x: Tensor, role: str = "target", index: Tensor | None = None) -> DomainBatch:
        """A batch outside a training step, with lazy features and logits."""
        data = {"x": x} if index is None else {"x": x, "index": index}
        return DomainBatch(self, self.target_name, role, data)

    def compute_features(self, batches: list[DomainBatch], view: str) -> None:
        """One forward for the view of all ``batches``: backbone, bottleneck, ``transform_features``."""
        xs = [b.views[view].x for b in batches]
        one = batches[0]
        with domain_context(one.name, one.role) if len(batches) == 1 else nullcontext():
            z = self.bottleneck(self.backbone(xs[0] if len(xs) == 1 else running.concatenate(xs, batches)))
        step = one._step
        if step is not None and z.requires_grad and one.role != "held_out":
            step.gate.append(z)
        parts = [z] if len(batches) == 1 else z.split([len(x) for x in xs])
        for b, features in zip(batches, parts, strict=True):
            b.views[view].features = self.hooks.chain(
                "transform_features", "features", model=self, batch=b, features=features
            )

    # ------------------------------------------------------------------------------------------ training

    @property
    def progress(self) -> float:
        """Share of the whole training that is done, in [0, 1]; the same after a resume."""
        return running.progress(self)

    def on_fit_start(self) -> None:
        """Last checks before the first step."""
        self.base_seed = self.trainer.strategy.broadcast(self.base_seed)
        checks.check_fit(self)

    def on_train_start(self) -> None:
        """Open profiler spans only where somebody looks."""
        self.hooks.profile = running.profile_of(self.trainer)
        self._finite = running.FiniteCheck(self)
        self._manual = ManualUpdates(self)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Randomness is a function of (seed, step, rank), so that a resumed run repeats it; then refresh."""
        index = self.trainer.fit_loop.epoch_loop.total_batch_idx
        running.refresh_if_due(self, batch_idx, index)
        running.seed_step(self.base_seed, index, self.global_rank, self.device)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor | None:
        """Hooks in the order prepare, align, pseudo-label, refine, weigh."""
        index = self.trainer.fit_loop.epoch_loop.total_batch_idx
        step = self._step = Step(self, batch, self.progress, batch_idx, index)
        objectives.prepare(self, step)
        objectives.collect(self, step)
        self._finite.see(step)
        running.log_step(self, step)
        if not self.automatic_optimization:
            running.manual_step(self, step)
            return None
        return self.total(step)

    def total(self, step: Step) -> Tensor:
        """Sum of the objectives of a step, weighed where a plugin weighs them."""
        return objectives.total(self, step)

    def again(self, step: Step, collect: bool = True) -> Step:
        """The batch of a step once more, at the weights as they are now: for manual methods of several passes.

        Args:
            collect: compute all objectives by all hooks; otherwise features and logits only, when asked for.
        """
        fresh = objectives.again(step)
        if collect:
            objectives.collect(self, fresh)
            for plugin in self.plugins.values():
                plugin.drop_diagnostics()  # those of the first pass are logged
        return fresh

    def manual_update(self, loss: Tensor, only: list[str] | None = None, phase: str = "step") -> None:
        """Backward and step for manual methods: clipping, accumulation, averaging over ranks.

        Args:
            loss: scalar; ``only``: names of optimiser groups to train (None: all); ``phase``: which accumulation
                buffer, for methods with several updates a batch.
        """
        every = self.manual_accumulate
        done = self._step.batch_idx + 1
        stepping = done % every == 0 or done == self.trainer.num_training_batches
        self._manual.update(loss, only, phase, stepping, every, self.manual_clip)
        self._step.updated = self._step.updated or stepping

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then ``after_step`` at once, so that a checkpoint of this batch holds what the hook wrote."""
        super().optimizer_step(*args, **kwargs)
        if self.automatic_optimization and self._step is not None:
            self._step.updated = True
            self.finish_step()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Batches without an optimiser step (accumulation) still reach ``after_step``."""
        self.finish_step()

    @torch.no_grad()
    def finish_step(self) -> None:
        """Call ``after_step`` once for the current batch and let go of its tensors."""
        if self._step is not None:
            self.hooks.all("after_step", step=self._step)
            self._step = None

    def on_train_epoch_end(self) -> None:
        """A NaN that was not looked at yet."""
        self._finite.look()

    # --------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The seed of the step-wise randomness travels with the weights."""
        checkpoint["uda"] = {"base_seed": self.base_seed}
        checkpoint["hyper_parameters"] = checkpointing.without_downloads(dict(checkpoint.get("hyper_parameters", {})))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit, by name; the weights that training began with are not asked for again."""
        self.init_from, self.started = None, True
        self.base_seed = checkpoint.get("uda", {}).get("base_seed", self.base_seed)
        if self.feature_dim is not None:
            checkpointing.check_resume(self, checkpoint["state_dict"])
