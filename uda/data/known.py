"""What a data module knows of its domains once they are read: pools, classes, shapes, names of rows."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from torch import LongTensor

from uda.checkpointing import read_start
from uda.data.batches import Request
from uda.data.checks import check_domains, check_shapes
from uda.data.classes import ClassSplit
from uda.data.default_views import default_views
from uda.data.domains import DomainData
from uda.data.feeds import Feeds
from uda.data.labelled import with_labelled_target
from uda.data.pools import DomainPools, Task, make_task
from uda.data.readers import Reader
from uda.data.settings import as_split
from uda.data.views import Views
from uda.errors import UDAError


class KnownDomains:
    """The domains of one task, read when first asked for: the part of :class:`uda.DataModule` that makes no batches.

    The attributes are those of the data module.
    """

    reader: Reader
    source_names: list[str]
    target_name: str
    classes: ClassSplit | None
    allow_missing_classes: bool
    heterogeneous: bool
    keep: dict[str, dict[str, float]] | None
    labelled_target: int
    source_val_fraction: float
    target_test_fraction: float
    sampling: str
    views: Views | None
    trainer: Any
    _feeds: Feeds
    _setting: str | None
    _seed: int | None
    _task: Task | None = None
    _shapes: dict[str, tuple[int, ...]] | None = None

    @property
    def seed(self) -> int:
        """Of order, splits and augmentation."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self._seed is None else self._seed

    @property
    def task(self) -> Task:
        """Domains, pools and label space; read when first asked for."""
        if self._task is None:
            check_domains(self.reader, self.source_names, self.target_name)
            target = self.reader.read(self.target_name)
            self._task = make_task(
                [self.reader.read(name) for name in self.source_names],
                target,
                self.classes or self._classes_of_model(target),
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

    def _classes_of_model(self, target: DomainData) -> ClassSplit | None:
        """Those of the model that the run starts from, where there is no source and the target has no labels."""
        model = getattr(self.trainer, "lightning_module", None) if self.trainer is not None else None
        if model is None or self.source_names or target.labels is not None:
            return None
        brought = [path for plugin in getattr(model, "plugins", {}).values() for path in plugin.start_files()]
        for path in [getattr(model, "init_from", None), *brought]:
            if path and (names := (read_start(path).get("hyper_parameters") or {}).get("class_names")):
                return as_split({"known": list(names)})
        return None

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
    def transforms(self) -> Views:
        """The run's views, those by kind of input where none are given."""
        if self.views is None:
            self.views = default_views([p.data for p in self.task.all()])
        return self.views

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
    def missing_classes(self) -> dict[str, list[int]]:
        """Ids of the classes that a source lacks, by source; those that have all are left out."""
        if self.multi_label:
            return {}
        have = {p.name: set(p.train.labels.tolist()) for p in self.task.sources}
        lacking = {name: [c for c in range(self.num_classes) if c not in found] for name, found in have.items()}
        return {name: ids for name, ids in lacking.items() if ids}

    @property
    def spec(self) -> dict[str, Any]:
        """What a model must know of the data, in plain types.

        ``input_shapes`` and ``missing_classes`` (ids that a source has no training sample of): where domains differ.
        """
        shapes, missing = self.input_shapes, self.missing_classes
        several = len(set(shapes.values())) > 1
        multi = {"multi_label": True} if self.multi_label else {}
        return multi | {
            "num_classes": self.num_classes,
            "class_names": self.class_names,
            "input_shape": list(self.input_shape),
            "sizes": self.sizes,
            "source_names": list(self.source_names),
            "target_name": self.target_name,
        } | ({"input_shapes": {n: list(s) for n, s in shapes.items()}} if several else {}) | (
            {"missing_classes": missing} if missing else {}
        )

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
