"""The data module: source and target batches for training, every domain for evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities import CombinedLoader

from uda.data.batches import BadImageLog, Request
from uda.data.checks import check_batches, check_settings
from uda.data.classes import ClassSplit
from uda.data.feeds import Feeds
from uda.data.imbalance import check_keep
from uda.data.known import KnownDomains
from uda.data.loaders import ShardedLoader
from uda.data.needs import needs_of
from uda.data.readers import Reader
from uda.data.settings import as_split, check_name
from uda.data.views import Views
from uda.errors import UDAError


class DataModule(KnownDomains, L.LightningDataModule):
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
        if not target:  # it has a default only because `source` before it must have one: null counts as left out
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

    def _eval_loaders(self, stage: str) -> list[ShardedLoader]:
        evaluated = self._evaluated(stage)
        return [self._feeds.sharded(p, p.eval, self.eval_batch_size, labelled=True) for p in evaluated]

    # --- how the run stands ------------------------------------------------------------------------------

    @property
    def _feeds(self) -> Feeds:
        trainer, pin = self.trainer, self.pin_memory
        if pin is None:
            pin = trainer is not None and trainer.strategy.root_device.type == "cuda"
        return Feeds(
            self.task,
            self.transforms,
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
