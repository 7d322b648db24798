"""All scores of a run from one evaluation pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uda.errors import UDAError, nearest
from uda.selection.guard import CollapseGuard
from uda.selection.mixing import mix, partners
from uda.selection.pool import RowSample, ScorePool
from uda.selection.registry import DEFAULT_SCORES, SCORES
from uda.selection.sums import PredictionSums

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.step import DomainBatch


@dataclass(frozen=True)
class ScoreOptions:
    """What is computed, and on how much.

    Args:
        names: of the scores; none: :data:`DEFAULT_SCORES`.
        cap: largest number of samples a domain in the common pool, drawn by ``seed``; 0: all.
        seed: of that draw, of the domain classifier's folds and of the Hopkins points; the same for all
            runs, so that their scores compare.
        guard: collapse thresholds.
    """

    names: tuple[str, ...] = DEFAULT_SCORES
    cap: int = 5000
    seed: int = 0
    guard: CollapseGuard = field(default_factory=CollapseGuard)

    @classmethod
    def make(cls, scores: list[str] | None, options: dict[str, Any] | None) -> ScoreOptions:
        """Options from the model's arguments.

        Raises:
            UDAError: unknown score or option, with the nearest names; a cap that is negative.
        """
        names = tuple(dict.fromkeys(DEFAULT_SCORES if scores is None else scores))
        for name in names:
            if name not in SCORES:
                raise UDAError(f"model.scores: unknown score {name!r}. {nearest(str(name), SCORES)}")
        options = dict(options or {})
        known = ("cap", "seed", "min_used", "max_share", "min_rank")
        for key in options:
            if key not in known:
                raise UDAError(f"model.score_options: unknown option {key!r}. {nearest(str(key), known)}")
        cap, seed = int(options.pop("cap", cls.cap)), int(options.pop("seed", cls.seed))
        if cap < 0 or seed < 0:
            raise UDAError(f"model.score_options: cap and seed must be 0 or more, got {cap} and {seed}.")
        return cls(names, cap, seed, CollapseGuard(**{k: float(v) for k, v in options.items()}))

    def check(self, sources: list[str]) -> None:
        """Refuse scores that this run cannot have.

        Raises:
            UDAError: a score of the source in a source-free run.
        """
        for name in self.names:
            if SCORES[name].needs_source and not sources:
                raise UDAError(f"model.scores: {name!r} needs source data, and this run has no source.")


class SharedScores:
    """Takes in the batches of one pass and gives all scores at its end. Target labels never reach it.

    Args:
        model: the skeleton.
        pool: whether to compute the scores of whole domains (not on a sanity check's few batches).
    """

    def __init__(self, model: UDA, pool: bool = True) -> None:
        self.model, self.options = model, model.score_options
        names = self.options.names
        self.from_sums = [n for n in names if SCORES[n].reads == "sums"]
        self.from_pool = [n for n in names if SCORES[n].reads == "pool" and pool]
        self.mixed = {n: SCORES[n]().to(model.device) for n in names if SCORES[n].reads == "mixed"}
        dtype = torch.float32 if model.device.type == "mps" else torch.float64
        self.sums = PredictionSums(model.num_classes, dtype).to(model.device)
        self.with_source = any(SCORES[n].needs_source for n in self.from_pool)
        self.samples: dict[str, RowSample] = {}

    def update(self, batch: DomainBatch, rows: Tensor, source_y: Tensor | None) -> None:
        """Take in this rank's own ``rows`` of a batch; ``source_y`` ``[B]`` on a source, None on a target."""
        if batch.role == "target":
            self.sums.update(batch.logits[rows])
            if self.mixed:
                self._mix(batch, rows)
        elif source_y is None or not self.with_source:
            return
        if self.from_pool:
            sample = self.samples.setdefault(batch.name, RowSample(self._cap(batch.role), self.options.seed))
            y = torch.full_like(batch.index, -1) if batch.role == "target" else source_y
            sample.add(batch.index[rows], batch.features[rows].float(), batch.logits[rows].float(), y[rows])

    def _cap(self, role: str) -> int:
        many = 1 if role == "target" else max(1, len(self.model.source_names))
        return -(-self.options.cap // many)

    def _mix(self, batch: DomainBatch, rows: Tensor) -> None:
        """Predict mixtures within a batch (two more forwards of the target)."""
        x, labels = batch.x[rows], batch.logits[rows].argmax(1)
        for kind, same in enumerate((True, False)):
            partner = partners(labels, same)
            keep = partner >= 0
            if not bool(keep.any()):
                continue
            mixed = self.model.batch(mix(x, partner.clamp_min(0))[keep]).logits.argmax(1)
            for metric in self.mixed.values():
                metric.update(labels[keep], mixed, kind)

    @torch.no_grad()
    def compute(self) -> dict[str, float]:
        """``select/<name>``, ``select/collapsed``, and ``guarded/<name>``, -inf on collapse.

        Collective under DDP. A score that has no value here (NaN) is given as NaN.
        """
        sums = self.sums.compute()
        if not float(sums.n):
            return {}
        out = {n: float(SCORES[n].score(sums)) for n in self.from_sums}
        out |= {n: float(metric.compute()) for n, metric in self.mixed.items()}
        if self.from_pool:
            out |= self._of_pool(self._pool())
        collapsed = self.options.guard.check(sums).collapsed
        logged = {f"select/{n}": out[n] for n in self.options.names if n in out}
        guarded = {f"guarded/{n}": -torch.inf if collapsed else v for n, v in out.items()}
        return {**logged, "select/collapsed": float(collapsed), **guarded}

    def _pool(self) -> ScorePool:
        model = self.model
        f, z = torch.zeros(0, model.feature_dim), torch.zeros(0, model.num_classes)
        i = torch.zeros(0, dtype=torch.long)
        domains = [model.target_name, *(model.source_names if self.with_source else [])]
        found = {}
        for name in domains:  # a rank may hold no row of a tiny domain
            role = "target" if name == model.target_name else "source"
            sample = self.samples.get(name, RowSample(self._cap(role), self.options.seed))
            found[name] = sample.gather(model.device, (i, f, z, i))
        _, target_features, target_logits, _ = found.pop(model.target_name)
        sources = [torch.cat(c) for c in zip(*found.values(), strict=True)] if found else [i, f, z, i]
        known = sources[3] >= 0
        vectors = getattr(model.head, "weight_vectors", None)
        return ScorePool(
            target_features, target_logits, *(c[known] for c in sources[1:]),
            None if vectors is None else vectors.detach().float().cpu(), self.options.seed,
        )  # fmt: skip

    def _of_pool(self, pool: ScorePool) -> dict[str, float]:
        """Computed by the first rank alone, so that no two ranks disagree in the last digit."""
        strategy, found, cause = self.model.trainer.strategy, None, None
        if strategy.is_global_zero:
            try:
                finite = pool.finite()
                found = {n: float(SCORES[n].score(pool)) if finite else torch.nan for n in self.from_pool}
            except Exception as error:  # the other ranks wait for an answer, whatever it is
                found, cause = f"{type(error).__name__}: {error}", error
        found = strategy.broadcast(found)
        if isinstance(found, str):
            raise UDAError(f"A label-free score of model.scores failed: {found}") from cause
        return found
