"""One evaluation pass over the domains: accuracy, label-free scores, and pools for the next refresh."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from uda import checks, running
from uda.metrics.counts import ConfusionMetric, accuracy
from uda.metrics.figures import TargetFigures
from uda.metrics.multilabel import MultiLabelFigures
from uda.metrics.names import oracle
from uda.passes import DomainPool, PoolCollector
from uda.plugin import Prediction
from uda.selection.multilabel import MultiLabelScores
from uda.selection.shared import SharedScores
from uda.step import DomainBatch

if TYPE_CHECKING:
    from uda.module import UDA


class Evaluation:
    """Metrics of one pass of a stage (``"val"`` or ``"test"``)."""

    def __init__(self, model: UDA) -> None:
        self.model = model
        self.confusions: dict[tuple[str, str], ConfusionMetric] = {}
        self.target = TargetFigures(model)
        self.scores = SharedScores(model, pool=not model.trainer.sanity_checking)
        self.collectors: dict[str, PoolCollector] = {}
        self.pools: dict[str, DomainPool] = {}

    def collect(self, name: str, role: str) -> None:
        """Keep features and logits of this domain: its evaluation set is its training pool."""
        self.collectors[name] = PoolCollector(name, role, self.model.sizes[name])

    def update(self, batch: DomainBatch, y: Tensor | None, rows: Tensor) -> None:
        """Take in one batch. ``y`` ``[B]`` holds -1 where a label is unknown; ``rows`` are this rank's own."""
        prediction = self.model.predict_batch(batch)
        y = y if y is not None else torch.full_like(prediction.label, -1)
        key = (batch.role, batch.name)
        if key not in self.confusions:  # class C stands for 'unknown'
            self.confusions[key] = ConfusionMetric(self.model.num_classes).to(self.model.device)
        self.confusions[key].update(prediction.label, torch.where(rows, y, -1), prediction.unknown)
        if batch.role == "target":
            self.target.update(batch, prediction, y, rows)
        self.scores.update(batch, rows, y if batch.role == "source" else None)
        if batch.name in self.collectors:
            collector = self.collectors[batch.name]
            collector.add(batch.index[rows], batch.features[rows], batch.logits[rows], y[rows])

    def compute(self) -> dict[str, float]:
        """All figures; those that target labels had a part in carry the prefix ``oracle/``. Collective under DDP."""
        out: dict[str, float] = {}
        source: list[float] = []
        for (role, name), metric in self.confusions.items():
            confusion = metric.compute()
            if confusion.sum() == 0:  # an unlabelled domain has no accuracy
                continue
            if role == "source":
                source.append(float(accuracy(confusion.cpu())))
                if len(self.model.source_names) > 1:
                    out[f"source_accuracy/{name}"] = source[-1]
            else:
                out |= {oracle(k): v for k, v in self.target.compute(confusion).items()}
        if source:
            out["source_accuracy"] = sum(source) / len(source)
        out |= self.scores.compute()
        self.pools = {name: c.pool(self.model) for name, c in self.collectors.items()}
        return out


class MultiLabelEvaluation(Evaluation):
    """The same where a sample may have several classes: average precisions in place of confusions."""

    def __init__(self, model: UDA) -> None:
        super().__init__(model)
        self.figures: dict[tuple[str, str], MultiLabelFigures] = {}
        self.scores = MultiLabelScores(model.num_classes, model.score_options.names).to(model.device)

    def update(self, batch: DomainBatch, y: Tensor | None, rows: Tensor) -> None:
        """Take in one batch; rows of ``y`` ``[B, C]`` that are -1 have no label."""
        logits = batch.logits
        y = torch.full_like(logits, -1) if y is None else y
        found = self.figures.setdefault((batch.role, batch.name), MultiLabelFigures(logits.shape[1], logits.device))
        found.update(logits.sigmoid(), y, rows)
        if batch.role == "target":
            self.scores.update(logits[rows])
        if batch.name in self.collectors:
            self.collectors[batch.name].add(batch.index[rows], batch.features[rows], logits[rows], y[rows])

    def compute(self) -> dict[str, float]:
        """All figures; those of a source are ``source_class_mean_ap`` and ``source_mean_ap``."""
        out: dict[str, float] = {}
        source: list[dict[str, float]] = []
        for (role, _), figures in self.figures.items():
            values = figures.compute()
            if role == "source":
                source.append(values)
            else:
                out |= {oracle(k): v for k, v in values.items()}
        for name in source[0] if source else ():
            out[f"source_{name}"] = sum(v[name] for v in source) / len(source)
        out |= self.scores.compute()
        self.pools = {name: c.pool(self.model) for name, c in self.collectors.items()}
        return out


class EvaluationLoop(L.LightningModule):
    """The validation, test and prediction hooks of :class:`uda.UDA`."""

    hooks: Any
    multi_label: bool | None
    _evaluation: Evaluation | None = None

    def predict_batch(self, batch: DomainBatch) -> Prediction:
        """Labels, scores and unknown mask by the first plugin that predicts, or by the softmax; then ``reject``."""
        _, prediction = self.hooks.first("predict", model=self, batch=batch)
        if prediction is None:
            score, label = self.probabilities(batch.logits).max(1)
            prediction = Prediction(label, score)
        return self.hooks.chain("reject", "prediction", model=self, batch=batch, prediction=prediction)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of the classes ``[B, C]``: a softmax; of each class by itself if multi-label."""
        return logits.sigmoid() if self.multi_label else logits.softmax(1)

    def _start_evaluation(self) -> None:
        stage = "test" if self.trainer.testing else "val"
        if stage == "test":
            checks.check_adapt(self)
        self.hooks.all("before_evaluation", model=self)
        self._evaluation = (MultiLabelEvaluation if self.multi_label else Evaluation)(self)
        self._eval_domains = running.eval_domains(self, stage)
        if stage == "val" and not self.trainer.sanity_checking:
            for name, role in self._eval_domains:
                if role in self.data_needs.refresh and self.trainer.datamodule.pool_is_eval(name):
                    self._evaluation.collect(name, role)

    def _evaluate(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        name, role = self._eval_domains[dataloader_idx]
        domain = DomainBatch(self, name, role, {k: v for k, v in batch.items() if k != "y"})
        if self.trainer.testing and role == "target" and self.hooks.filled("adapt"):
            running.adapt(self, domain)
        self._evaluation.update(domain, batch.get("y"), self.owned_rows(batch["index"]))

    def _finish_evaluation(self, prefix: str) -> None:
        values = self._evaluation.compute()
        if self.trainer.state.fn == "fit":
            self._pools = (running.batches_done(self.trainer), self._evaluation.pools)
        self._evaluation = None
        shown = {prefix + k: v for k, v in values.items() if not k.startswith("guarded/")}
        self.log_dict(shown)
        if not prefix:  # only for callbacks that monitor; loggers get the plain scores and select/collapsed
            self.log_dict({k: v for k, v in values.items() if k.startswith("guarded/")}, logger=False)

    def owned_rows(self, index: Tensor) -> Tensor:
        """Rows ``[B]`` that this rank answers for: padding that only evens out the ranks is dropped."""
        return index % self.trainer.world_size == self.global_rank

    def on_validation_epoch_start(self) -> None:
        """Fresh metrics for one pass over all domains."""
        self._start_evaluation()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Metrics, scores and pools of one batch."""
        self._evaluate(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        """Log ``source_accuracy``, ``oracle/...``, ``select/...``, and ``guarded/...`` for callbacks."""
        self._finish_evaluation("")

    def on_test_epoch_start(self) -> None:
        """Fresh metrics for one pass over all domains."""
        self._start_evaluation()

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Metrics of one batch, adapted to first where a plugin adapts."""
        self._evaluate(batch, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        """Log the same figures with the prefix ``test/``."""
        self._finish_evaluation("test/")

    def on_predict_epoch_start(self) -> None:
        """Conditions of test-time adaptation, and what plugins make ready."""
        checks.check_adapt(self)
        self.hooks.all("before_evaluation", model=self)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``index``, ``label``, ``score``, ``unknown``, ``unknown_score`` and ``probs`` of a target batch."""
        domain = self.batch(batch["x"], index=batch["index"])
        if self.hooks.filled("adapt"):
            running.adapt(self, domain)
        p = self.predict_batch(domain)
        unknown = p.unknown if p.unknown is not None else torch.zeros_like(p.label, dtype=torch.bool)
        rows = self.owned_rows(batch["index"])
        out = {"index": batch["index"], "label": p.label, "score": p.score, "unknown": unknown}
        out["unknown_score"] = p.unknown_scores
        out["probs"] = self.probabilities(domain.logits)
        return {k: v[rows] for k, v in out.items()}
