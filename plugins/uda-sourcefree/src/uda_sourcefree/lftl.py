"""Active source-free adaptation: learn from the learnt (LFTL: Lyu et al., ECCV 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.data.samplers import UniformStream, derive_seed
from uda.losses import class_distributions, entropy, information_maximisation, soft_cross_entropy
from uda.nn import Bank, full, no_autocast
from uda.step import DomainBatch
from uda_sourcefree.mixing import mixed
from uda_sourcefree.oracle import Oracle, class_ids, make_oracle
from uda_sourcefree.queries import badge, clue, contrastive_scores, entropies, k_centre

SAMPLING = ("contrastive", "margin", "entropy", "badge", "clue", "k_centre", "random")


def persistence(features: Tensor, memory: Tensor) -> Tensor:
    """Mean entropy of the softmax of cosines to the labelled samples: ``[B, F]`` and constants ``[n, F]``."""
    with no_autocast(features):
        return entropy(F.normalize(full(features), dim=1) @ F.normalize(full(memory), dim=1).T).mean()


class LFTL(uda.Plugin):
    """Asks for labels of a few target samples, round by round, and learns from them and from the unlabelled ones.

    ``CE(labelled) + entropy_weight (mean H(p) - H(mean p)) + persistence_weight * L_att + mixup * CE(mixed labelled)``:
    ``L_att`` of :func:`persistence` draws target samples to labelled ones. Samples are those of smallest
    :func:`contrastive_scores`. Labels come from ``oracle`` alone, never from the data module. A round opens an equal
    part of the run. All parts of the network train. Start from the source's model: ``model.init_from``.

    Args:
        budget: labels in all: a share of the target's training pool below 1, else a number of samples.
        oracle: who answers, an :class:`~uda_sourcefree.oracle.Oracle` or its ``{class_path, init_args}``.
        rounds: published: 10. The run's epochs should be a multiple of them: a round opens with an epoch.
        sampling: ``contrastive``, as published; baselines: ``margin`` (smallest margin alone), ``entropy`` (largest),
            ``badge``, ``clue``, ``k_centre`` (:mod:`uda_sourcefree.queries`), ``random``.
        strength: of the change since the last round; balance: of the class frequency; confident: samples that it is
            counted over. Published: 0.03, 0.1, and 100 (500 on VisDA).
        entropy_weight: published: 0.9; persistence_weight: published: 1 on Office-31, 10 on VisDA.
        mixup: weight of mixed labelled samples, 0 for none; alpha: of their Beta distribution.
        momentum: share of the new feature in the memory of labelled samples.
    """

    settings = ("closed", "source-free", "semi-supervised")
    search_space: ClassVar[dict[str, Any]] = {"persistence_weight": (0.1, 10.0, "log"), "entropy_weight": (0.1, 1.0)}
    labels: Tensor
    chosen: Tensor
    before: Tensor
    state: Tensor

    def __init__(
        self,
        budget: float,
        oracle: Oracle | dict | None = None,
        rounds: int = 10,
        sampling: str = "contrastive",
        strength: float = 0.03,
        balance: float = 0.1,
        confident: int = 100,
        entropy_weight: float = 0.9,
        persistence_weight: float = 1.0,
        mixup: float = 1.0,
        alpha: float = 0.75,
        momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.oracle = make_oracle(oracle)
        if sampling not in SAMPLING:
            raise uda.UDAError(f"LFTL: sampling {sampling!r} is none of {', '.join(SAMPLING)}.")
        whole = budget <= 1 or float(budget).is_integer()  # no number and infinity are neither
        if not (budget > 0 and whole) or rounds < 1 or confident < 1:
            raise uda.UDAError("LFTL: budget is a share in (0, 1) or a number of samples; rounds, confident 1 or more.")
        if min(strength, balance, entropy_weight, persistence_weight, mixup) < 0 or alpha <= 0 or not 0 < momentum <= 1:
            raise uda.UDAError("LFTL: weights must not be negative, alpha must be positive, momentum in (0, 1].")
        self.budget, self.rounds, self.sampling = budget, rounds, sampling
        self.strength, self.balance, self.confident = strength, balance, confident
        self.entropy_weight, self.persistence_weight = entropy_weight, persistence_weight
        self.mixup, self.alpha, self.momentum = mixup, alpha, momentum
        self.memory: Bank | None = None
        self._slots: Tensor | None = None  # of the batch under way

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone, whole at the start of each epoch."""
        return uda.DataNeeds(source=False, refresh={"target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the labels that the budget buys.

        Raises:
            UDAError: a budget larger than the target, or smaller than a sample a round.
        """
        size = model.sizes.get(model.target_name, 0)
        number = self.count(max(size, 1))
        if size and number > size:
            raise uda.UDAError(f"LFTL: a budget of {number} labels, but the target has {size} samples: ask for fewer.")
        if size and number < self.rounds:
            raise uda.UDAError(f"LFTL: a budget of {number} labels does not do for {self.rounds} rounds.")
        if self.memory is None:
            self.memory = Bank(max(number, 1), features=model.feature_dim)
            self.register_buffer("labels", torch.zeros(max(number, 1), dtype=torch.long))
            self.register_buffer("chosen", torch.full((max(number, 1),), -1))  # position in the pool, by slot
            self.register_buffer("before", torch.zeros(max(size, 1), model.num_classes))
            self.register_buffer("state", torch.zeros(2, dtype=torch.long))  # labels there are, rounds that were

    def count(self, size: int) -> int:
        """Labels that the budget buys in a target of ``size`` samples."""
        return round(self.budget * size) if self.budget < 1 else int(self.budget)

    # ------------------------------------------------------------------------------------------------ queries

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: uda.Pools) -> None:
        """Ask where a round is due; look at the labelled samples anew."""
        epochs, pool = model.trainer.max_epochs, bank.target
        if epochs is not None and 0 < epochs < self.rounds:
            raise uda.UDAError(f"LFTL: {self.rounds} rounds need as many epochs at least, the run has {epochs}.")
        due = min(self.rounds, int(model.progress * self.rounds + 1e-6) + 1)
        while int(self.state[1]) < due:
            self._ask(model, full(pool.logits).softmax(1), full(pool.features))
        have = int(self.state[0])
        self.memory.features[:have] = pool.features[self.chosen[:have]]  # equal on all ranks, like the pool
        self.memory.filled[:have] = True
        self.log_later(labelled=float(have))

    def _ask(self, model: uda.UDA, probs: Tensor, features: Tensor) -> None:
        have, turn = self.state.tolist()
        wanted = round((turn + 1) * len(self.chosen) / self.rounds) - have
        free = torch.ones(len(probs), dtype=torch.bool, device=probs.device)
        free[self.chosen[:have]] = False
        rest = free.nonzero()[:, 0]
        rows = rest[self._select(wanted, probs[rest], features[rest], features[self.chosen[:have]], self.before[rest])]
        rows, given = model.trainer.strategy.broadcast(self._answers(model, rows.tolist(), turn), src=0)
        if isinstance(given, Exception):
            raise given
        self.chosen[have : have + len(rows)] = torch.tensor(rows, device=self.chosen.device)
        self.labels[have : have + len(rows)] = torch.tensor(given, device=self.labels.device)
        self.before.copy_(probs)
        self.state += torch.tensor([len(rows), 1], device=self.state.device)
        for optimizer in model.trainer.optimizers:  # a round starts with a new one, as published
            optimizer.state.clear()

    def _select(self, number: int, probs: Tensor, features: Tensor, known: Tensor, before: Tensor) -> Tensor:
        """Rows of unlabelled samples to ask about; all draws are of the refresh's seed, one on all ranks."""
        if self.sampling == "badge":
            return badge(probs, features, number)
        if self.sampling == "clue":
            return clue(probs, features, number, int(torch.randint(2**31, ())))
        if self.sampling == "k_centre":
            return k_centre(features, known, number)
        if self.sampling == "random":
            scores = torch.rand(len(probs), device=probs.device)
        elif self.sampling == "entropy":
            scores = -entropies(probs)
        elif self.sampling == "margin":
            scores = contrastive_scores(probs, None, balance=0.0)
        else:
            before = before if int(self.state[1]) else None
            scores = contrastive_scores(probs, before, self.strength, self.confident, self.balance)
        return scores.topk(number, largest=False).indices

    def _answers(self, model: uda.UDA, rows: list[int], turn: int) -> tuple[list[int], list[int] | Exception]:
        """Positions and class ids of a round, on the first process; an error is for all of them."""
        if model.trainer.global_rank:
            return [], []
        try:
            names = model.trainer.datamodule.pool_ids(model.target_name)
            if (asked := self.oracle.asked(turn)) is not None:  # a run that was stopped: its queries, not new ones
                place = {name: i for i, name in enumerate(names)}
                if strange := [i for i in asked if i not in place]:
                    raise uda.UDAError(f"LFTL: {strange[0]!r} of round {turn} is no sample of {model.target_name!r}.")
                if len(asked) != len(rows) or set(map(place.get, asked)) & set(self.chosen.tolist()):
                    raise uda.UDAError(
                        f"LFTL: round {turn} asks for {len(rows)} new samples, the oracle was asked for {len(asked)} "
                        "by a run with another budget or other rounds, or lines are lost: give the same settings, or "
                        "name another file."
                    )
                rows = [place[i] for i in asked]
            ids = [names[i] for i in rows]
            classes = model.class_names or [str(c) for c in range(model.num_classes)]
            return rows, class_ids(self.oracle.answer(ids, turn, classes), ids, classes, type(self.oracle).__name__)
        except Exception as error:
            return rows, error

    # ------------------------------------------------------------------------------------------------ training

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """The labelled samples of this step, and pairs of them mixed."""
        model, trainer, have = step.model, step.model.trainer, int(self.state[0])
        if step.labelled is not None:
            raise uda.UDAError("LFTL asks for its labels itself: leave data.labelled_target at 0.")
        size = min(len(step.target), max(1, have // trainer.world_size))
        start = (step.index * trainer.world_size + trainer.global_rank) * size
        slots = UniformStream(have, model.base_seed, f"LFTL/{have}").take(start, start + size)
        self._slots = torch.as_tensor(slots, device=self.labels.device)
        rows, y = self.chosen[self._slots], self.labels[self._slots]
        seed = derive_seed(model.base_seed, "LFTL", step.index, trainer.global_rank)
        x = trainer.datamodule.samples(model.target_name, rows.cpu().numpy(), seed)["x"].to(step.target.x)
        step.labelled = DomainBatch(model, model.target_name, "labelled", {"x": x, "index": rows, "y": y}, step)
        step.joint.append(step.labelled)
        if self.mixup:
            x, soft = mixed(x, class_distributions(y, model.num_classes), self.alpha)
            pairs = DomainBatch(model, model.target_name, "labelled", {"x": x, "index": rows}, step)
            pairs.y = soft
            step.joint.append(pairs)
            step.cache[f"{self.key}.mixed"] = pairs

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Information of the unlabelled samples, their attention to labelled ones, and the mixed samples."""
        have, out = int(self.state[0]), {}
        free = (~torch.isin(step.target.index, self.chosen[:have])).nonzero()[:, 0]  # the labelled ones have their term
        some = bool(len(free))
        if self.entropy_weight:
            value = information_maximisation(step.target.logits[free]) if some else 0 * step.target.logits.sum()
            out["information"] = -self.entropy_weight * value
        if self.persistence_weight:
            rows = step.target.features[free]
            value = persistence(rows, self.memory.features[:have]) if some else 0 * step.target.features.sum()
            out["persistence"] = self.persistence_weight * value
        if (pairs := step.cache.get(f"{self.key}.mixed")) is not None:
            out["mixup"] = self.mixup * soft_cross_entropy(pairs.logits, pairs.y)
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Move the memory of the labelled samples of the batch."""
        if self._slots is not None:
            self.memory.write(self._slots, momentum=1 - self.momentum, features=step.labelled.features)
            self._slots = None
