"""The data module: source and target batches for training, every domain for evaluation."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch import LongTensor

from uda.data.batches import BadImageLog, Request
from uda.data.checks import check_batches, check_domains, check_settings, check_shapes
from uda.data.classes import ClassSplit
from uda.data.default_views import default_views
from uda.data.feeds import Feeds
from uda.data.imbalance import check_keep
from uda.data.labelled import with_labelled_target
from uda.data.loaders import ShardedLoader
from uda.data.needs import needs_of
from uda.data.pools import DomainPools, Task, make_task
from uda.data.readers import Reader
from uda.data.settings import as_split, check_name
from uda.data.views import Views
from uda.errors import UDAError


class DataModule(L.LightningDataModule):
    """Domains of one task, as endless training batches and as evaluation passes.

    Training batches are ``{"sources": {name: batch}, "target": batch, "held_out": batch}``, absent where the
    model does not need them. A batch is ``{"x": [B, ...], "index": int64 [B]}``, ``weak`` and ``strong``
    where a plugin asks for them, and ``y`` (int64 [B]) on sources **only**: target batches come from an
    object that holds no labels. ``index`` is the position in the domain's training pool. Evaluation batches
    are ``{"x", "y", "index"}`` with ``y = -1`` where there is no label and ``y = num_classes + j`` for the j-th
    unknown class.

    The order is a function of (seed, domain, step): independent of workers, resumable in mid-epoch, and of
    the target labels it knows nothing. See :mod:`uda.data.samplers`.

    Args:
        reader: where domains come from.
        source: name of the source domain, or several; None: source-free.
        target: name of the target domain.
        batch_size: images of each source, a step and process.
        target_batch_size: of the target; None: ``batch_size``.
        eval_batch_size: in evaluation.
        epoch_steps: steps an epoch; None: as many as the longest domain needs for one pass.
        source_val_fraction: held back from source training, the same share of each class, to measure source
            accuracy; 0: the source is evaluated on its training images.
        target_test_fraction: held back from the target; 0 is the field's transductive protocol, evaluation on
            the same unlabelled images that the model adapts to.
        held_out_fraction: share of the target's pool for ``held_out`` batches, if a plugin needs them; those
            images are then in no target batch.
        classes: class names by where they occur (``known``, ``source_private``, ``target_private``); or how many of
            each, with a ``seed``; or the name of a published split, such as ``office31_universal``. None: the closed
            set, or with an open ``setting`` the classes as they occur. Rows of other classes take no part.
        setting: ``closed``, ``partial``, ``open`` or ``universal``: the classes must fit it, and the methods serve it
            (docs/settings.md). None: what the classes make it. No method is told.
        any_method: let methods take part that do not serve the setting, as a warning beside those that do.
        allow_missing_classes: let a domain lack classes of the closed set.
        keep: class-imbalanced domains: share of its samples that a class keeps, by domain and class name. The
            names ``first_half`` and ``second_half`` stand for the first ``floor(C / 2)`` classes and the others:
            ``{my_target: {first_half: 0.3}}``. What stays is the same for all seeds, and is trained and evaluated on.
        heterogeneous: let domains differ in input shape.
        labelled_target: samples a class of the target whose labels the training may use, drawn by the seed: the
            semi-supervised setting. They are not evaluated on, and come as batches ``labelled`` (``step.labelled``).
            0, the default, is unsupervised: no target label reaches the training.
        views: the transforms; None: by kind of input.
        sampling: of the sources; ``class_balanced`` draws every class equally often.
        on_bad_image: ``stop`` with an error that names the file, or ``skip`` it for another and report the
            number.
        num_workers: worker processes of each domain's loader.
        pin_memory: None: if the accelerator is a CUDA device.
        seed: of order and augmentation; None: that of ``seed_everything``, else 0.
    """

    def __init__(
        self,
        reader: Reader,
        source: str | list[str] | None = None,
        target: str = "",
        batch_size: int = 32,
        target_batch_size: int | None = None,
        eval_batch_size: int = 256,
        epoch_steps: int | None = None,
        source_val_fraction: float = 0.1,
        target_test_fraction: float = 0.0,
        held_out_fraction: float = 0.1,
        classes: ClassSplit | dict | str | None = None,
        setting: str | None = None,
        any_method: bool = False,
        allow_missing_classes: bool = False,
        keep: dict[str, dict[str, float]] | None = None,
        heterogeneous: bool = False,
        labelled_target: int = 0,
        views: Views | None = None,
        sampling: Literal["uniform", "class_balanced"] = "uniform",
        on_bad_image: Literal["stop", "skip"] = "stop",
        num_workers: int = 0,
        pin_memory: bool | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if (
            not target
        ):  # it has a default only because `source` before it must have one: null counts as left out
            raise UDAError("data.target is missing: name the target domain")
        self.reader = reader
        self.source_names: list[str] = [source] if isinstance(source, str) else list(source or [])
        self.target_name = target
        self.batch_size, self.target_batch_size = batch_size, target_batch_size
        self.eval_batch_size, self.epoch_steps = eval_batch_size, epoch_steps
        self.source_val_fraction, self.target_test_fraction = source_val_fraction, target_test_fraction
        self.held_out_fraction = held_out_fraction
        check_name(setting)
        self.classes, self._setting, self.any_method = as_split(classes), setting, any_method
        self.allow_missing_classes, self.heterogeneous = allow_missing_classes, heterogeneous
        self.keep, self.labelled_target = check_keep(keep), labelled_target
        if labelled_target < 0:
            raise UDAError(f"data.labelled_target must be 0 or more samples a class, not {labelled_target}")
        self.views, self.sampling, self.on_bad_image = views, sampling, on_bad_image
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._seed = seed
        self._task: Task | None = None
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._log = BadImageLog()
        check_settings(
            {
                "batch_size": batch_size,
                "target_batch_size": target_batch_size,
                "eval_batch_size": eval_batch_size,
                "epoch_steps": epoch_steps,
            },
            {
                "source_val_fraction": source_val_fraction,
                "target_test_fraction": target_test_fraction,
                "held_out_fraction": held_out_fraction,
            },
            {
                "sampling": (sampling, ("uniform", "class_balanced")),
                "on_bad_image": (on_bad_image, ("stop", "skip")),
            },
        )

    @classmethod
    def from_datasets(cls, source: Any, target: Any, **kwargs: Any) -> DataModule:
        """Data module over torch datasets that give ``(x, y)`` or ``x``.

        Args:
            source: a dataset, or ``{name: dataset}`` for several sources, or None.
            target: a dataset; its labels are used in evaluation only.
            **kwargs: of the data module.
        """
        from uda.data.torch_datasets import Datasets

        sources = source if isinstance(source, dict) else {} if source is None else {"source": source}
        reader = Datasets(**sources, target=target)
        return cls(reader, source=list(sources) or None, target="target", **kwargs)

    # --- what is known once the domains are read ---------------------------------------------------------

    @property
    def seed(self) -> int:
        """Of order, splits and augmentation."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    @property
    def task(self) -> Task:
        """Domains, pools and label space; read when first asked for."""
        if self._task is None:
            check_domains(self.reader, self.source_names, self.target_name)
            self._task = make_task(
                [self.reader.read(name) for name in self.source_names],
                self.reader.read(self.target_name),
                self.classes,
                self.allow_missing_classes,
                self.source_val_fraction,
                self.target_test_fraction,
                self.seed,
                self.keep,
                self._setting,
            )
            if self.multi_label and (self.labelled_target or self.sampling != "uniform"):
                raise UDAError("multi-label data: leave data.labelled_target and data.sampling out")
            if self.labelled_target:
                self._task = with_labelled_target(self._task, self.labelled_target, self.seed)
        return self._task

    @property
    def setting(self) -> str:
        """``closed``, ``partial``, ``open`` or ``universal``; for evaluation and checks, never for a method."""
        return self.task.setting

    @property
    def multi_label(self) -> bool:
        """Whether a sample may have several classes: ``y`` is then 0 or 1, float32 ``[B, C]``."""
        return self.task.space.multi_label

    @property
    def num_classes(self) -> int:
        """Number of classes of the sources (unknown is none of them)."""
        return len(self.task.space.class_names)

    @property
    def class_names(self) -> list[str]:
        """Class names of the sources in id order."""
        return list(self.task.space.class_names)

    @property
    def input_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of one input of each domain after the test view."""
        if self._shapes is None:
            shapes = {}
            for pools in self.task.all():
                dataset = self._feeds.dataset(pools, pools.train, {"x": "test"})
                shapes[pools.name] = tuple(dataset[Request(np.zeros(1, dtype=np.int64), 0)]["x"].shape[1:])
            check_shapes(shapes, self.heterogeneous)
            self._shapes = shapes
        return dict(self._shapes)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input after the test view; of the first source where domains differ."""
        return next(iter(self.input_shapes.values()))

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each domain's training pool; the target's includes what may be held out."""
        return {p.name: len(p.train) for p in self.task.all()}

    @property
    def spec(self) -> dict[str, Any]:
        """What a model must know of the data, in plain types; ``input_shapes`` only where domains differ."""
        shapes = self.input_shapes
        several = len(set(shapes.values())) > 1
        multi = {"multi_label": True} if self.multi_label else {}
        return multi | {
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "input_shape": list(self.input_shape),
            "sizes": self.sizes,
            "source_names": list(self.source_names),
            "target_name": self.target_name,
        } | ({"input_shapes": {n: list(s) for n, s in shapes.items()}} if several else {})

    @property
    def labelled(self) -> LongTensor | None:
        """Class ids of the labelled target samples by pool position, -1 elsewhere; None in an unsupervised run."""
        return self.task.labelled

    def ids(self, domain: str) -> list[str]:
        """Name of each row (path or number) of a domain's evaluation pool, in the order of ``index``."""
        pools = self.task[domain]
        return [pools.data.row_id(int(row)) for row in pools.eval.rows]

    def pool_ids(self, domain: str) -> list[str]:
        """Name of each row (path or number) of a domain's *training* pool, in the order of ``index``."""
        pools = self.task[domain]
        return [pools.data.row_id(int(row)) for row in pools.train.rows]

    def samples(self, domain: str, positions: np.ndarray, seed: int, view: str = "train") -> dict[str, Any]:
        """Chosen samples of a domain's training pool as a batch ``{"x", "index"}``, without labels.

        For methods that pick samples themselves. The process that asks reads them. One that cannot be read is an
        error, whatever ``on_bad_image`` says.

        Args:
            positions: in the training pool ``[B]``; seed: of their augmentation; view: one of the transforms.
        """
        pools = self.task[domain]
        feeds = replace(self._feeds, on_bad_image="stop")  # another sample in its place would not be the chosen one
        dataset = feeds.dataset(pools, pools.train, {"x": view})
        return dataset[Request(np.asarray(positions, dtype=np.int64), seed)]

    def setup(self, stage: str | None = None) -> None:
        """Read the domains and check everything that can be checked without a step."""
        self.task  # noqa: B018
        self.input_shapes  # noqa: B018
        if stage in (None, "fit"):
            self._check_batches()

    def teardown(self, stage: str | None = None) -> None:
        """Report images that were skipped since the last epoch's end."""
        for name in list(self._log.paths):
            self._log.report(name)

    # --- loaders -----------------------------------------------------------------------------------------

    def train_dataloader(self) -> CombinedLoader:
        """Endless streams of what the model needs, ``epoch_steps`` batches an epoch."""
        self._check_batches()
        loaders = self._feeds.training(
            needs_of(self.trainer),
            self.batch_size,
            self._target_batch,
            self.epoch_steps,
            self.held_out_fraction,
            self.sampling == "class_balanced",
        )
        return CombinedLoader(loaders, mode="min_size")

    def val_dataloader(self) -> list[ShardedLoader]:
        """A loader for each of ``eval_domains("val")``."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[ShardedLoader]:
        """A loader for each of ``eval_domains("test")``."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[ShardedLoader]:
        """A loader of the target."""
        return self._eval_loaders("predict")

    def pool_dataloader(self, domain: str, views: Views | None = None) -> ShardedLoader:
        """One pass over a domain's whole training pool in index order, test view; ``y`` for sources only.

        Args:
            views: other transforms than the run's, for a second network.
        """
        pools = self.task[domain]
        feeds = self._feeds if views is None else replace(self._feeds, views=views)
        return feeds.sharded(pools, pools.train, self.eval_batch_size, labelled=not pools.is_target)

    def pool_is_eval(self, domain: str) -> bool:
        """Whether the evaluation loader of a domain walks its training pool, with the same indices."""
        pools = self.task[domain]
        return pools.eval is pools.train

    def eval_domains(self, stage: str = "val") -> list[str]:
        """Domain of each evaluation loader: sources, then the target; ``predict``: the target alone."""
        return [p.name for p in self._evaluated(stage)]

    def eval_is_target(self, stage: str = "val") -> list[bool]:
        """Whether each evaluation loader is the target's, in the same order."""
        return [p.is_target for p in self._evaluated(stage)]

    def _evaluated(self, stage: str) -> list[DomainPools]:
        if stage not in ("val", "validate", "test", "predict"):
            raise UDAError(f"stage {stage!r} has no evaluation loaders; use val, test or predict")
        return [self.task.target] if stage == "predict" else self.task.all()

    def _eval_loaders(self, stage: str) -> list[ShardedLoader]:
        evaluated = self._evaluated(stage)
        return [self._feeds.sharded(p, p.eval, self.eval_batch_size, labelled=True) for p in evaluated]

    # --- how the run stands ------------------------------------------------------------------------------

    @property
    def _feeds(self) -> Feeds:
        if self.views is None:
            self.views = default_views([p.data for p in self.task.all()])
        trainer, pin = self.trainer, self.pin_memory
        if pin is None:
            pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return Feeds(
            self.task,
            self.views,
            self.seed,
            rank=trainer.global_rank if trainer is not None else 0,
            world=trainer.world_size if trainer is not None else 1,
            done=self._batches_done,
            log=self._log,
            on_bad_image=self.on_bad_image,
            workers=self.num_workers,
            pin=pin,
        )

    def _batches_done(self) -> int:
        """Training batches behind the run, over all epochs.

        ``processed`` is right whether a checkpoint was written after a batch, in validation, at an epoch's
        end or by a signal within a step; the trainer restores its counters before it asks the loaders for an
        iterator.
        """
        if self.trainer is None:
            return 0
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed

    def _check_batches(self) -> None:
        world = self.trainer.world_size if self.trainer is not None else 1
        check_batches(self.task, self.batch_size, self._target_batch, world, needs_of(self.trainer))

    @property
    def _target_batch(self) -> int:
        return self.target_batch_size or self.batch_size
