"""The blackboard of one training step: batches of each domain with lazily computed features and logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uda.nn import domain_context

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.plugin import PseudoLabels

VIEWS = ("x", "weak", "strong")


class View:
    """One view of a batch: the input ``x``, its ``features`` ``[B, F]`` and ``logits`` ``[B, C]``.

    What was computed under ``no_grad`` is computed again when it is asked for with gradients on, so that a plugin
    that only labels by a view takes no gradient from another one that trains on it.
    """

    __slots__ = ("_batch", "_features", "_logits", "_no_graph", "name", "x")

    def __init__(self, batch: DomainBatch, name: str, x: Tensor) -> None:
        self._batch, self.name, self.x = batch, name, x
        self._features: Tensor | None = None
        self._logits: Tensor | None = None
        self._no_graph = [False, False]  # of features and logits: they were computed under no_grad

    @property
    def features(self) -> Tensor:
        """Features after the bottleneck and ``transform_features``; computed once."""
        if not self.computed:
            self._batch._forward(self.name)
        return self._features  # type: ignore[return-value]

    @features.setter
    def features(self, value: Tensor) -> None:
        self._features, self._logits, self._no_graph = value, None, [False, False]

    @property
    def logits(self) -> Tensor:
        """Classifier output for :attr:`features`; computed once."""
        if self._logits is None or (self._no_graph[1] and torch.is_grad_enabled()):
            features = self.features
            with domain_context(self._batch.name, self._batch.role):
                self._logits = self._batch.model.head(features)
            self._no_graph[1] = not torch.is_grad_enabled()
        return self._logits

    def set_logits(self, value: Tensor) -> None:
        """Logits from elsewhere (test-time adaptation)."""
        self._logits, self._no_graph[1] = value, False

    @property
    def computed(self) -> bool:
        """Whether the forward has run, with gradients if these are on."""
        return self._features is not None and not (self._no_graph[0] and torch.is_grad_enabled())


class DomainBatch:
    """The samples of one domain in a step.

    Attributes:
        name: domain name; ``role``: ``"source"``, ``"target"``, ``"held_out"`` or ``"labelled"``.
        views: ``{"x": View, "weak": View, "strong": View}``, those that are loaded.
        y: class ids ``[B]`` (or a distribution ``[B, C]`` after mixing; multi-label: 0 or 1 ``[B, C]``); None on an
            unlabelled target.
        index: position of each sample in its domain's training pool ``[B]``.
        weight: of each source sample in its classification ``[B]``, set in ``prepare_batch``: the objective is the mean
            over all B samples of weight times cross-entropy. None for 1.
        pseudo: pseudo-labels of this step, on the target only.
        cache: free space for a plugin's intermediates; keys should start with the plugin's key.
    """

    __slots__ = ("_step", "cache", "index", "model", "name", "pseudo", "role", "views", "weight", "y")

    def __init__(self, model: UDA, name: str, role: str, data: dict[str, Tensor], step: Step | None = None) -> None:
        self.model, self.name, self.role, self._step = model, name, role, step
        self.views = {v: View(self, v, data[v]) for v in VIEWS if v in data}
        self.y: Tensor | None = data.get("y") if role in ("source", "labelled") else None
        self.index: Tensor | None = data.get("index")
        self.pseudo: PseudoLabels | None = None
        self.weight: Tensor | None = None
        self.cache: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.views["x"].x)

    @property
    def x(self) -> Tensor:
        """Input of the plain view."""
        return self.views["x"].x

    @x.setter
    def x(self, value: Tensor) -> None:
        self.views["x"] = View(self, "x", value)

    @property
    def features(self) -> Tensor:
        """Features ``[B, F]`` of the plain view."""
        return self.views["x"].features

    @features.setter
    def features(self, value: Tensor) -> None:
        self.views["x"].features = value

    @property
    def logits(self) -> Tensor:
        """Logits ``[B, C]`` of the plain view."""
        return self.views["x"].logits

    def view(self, name: str) -> View:
        """The view ``"x"``, ``"weak"`` or ``"strong"``."""
        if name not in self.views:
            needs = "views" if self.role == "target" else "source_views"
            raise KeyError(f"View {name!r} of the {self.role} batch is not loaded: ask for it in data_needs ({needs}).")
        return self.views[name]

    def _forward(self, view: str) -> None:
        if self._step is not None and self.model.joint_forward and self in self._step.joint:
            together = [b for b in self._step.joint if view in b.views and not b.views[view].computed]
        else:
            together = [self]
        parts = [(b.name, b.role, len(b.views[view].x)) for b in together]
        name, role = (self.name, self.role) if len(parts) == 1 else ("joint", "joint")
        with domain_context(name, role, parts):
            self.model.compute_features(together, view)
        for batch in together:
            batch.views[view]._no_graph[0] = not torch.is_grad_enabled()


class Step:
    """What the hooks of one training step share.

    Attributes:
        model: the skeleton.
        sources: source batches by domain name; ``source`` is the first one (None when source-free).
        target: the unlabelled target batch (None in plain source-only training).
        held_out: unlabelled target batch that no objective trains on, where asked for.
        labelled: target batch with labels; None but in a semi-supervised run (``data.labelled_target``).
        progress: share of the whole training that is done, in [0, 1].
        batch_idx: batch number in the epoch; ``index``: batch number in the whole training.
        objectives: ``{name: scalar}`` so far.
        gate: features of backbone and bottleneck that joint objectives have passed through.
        updated: whether the optimiser has stepped on this batch (known in ``after_step``).
        cache: free space shared by plugins.
    """

    def __init__(self, model: UDA, data: dict[str, Any], progress: float, batch_idx: int, index: int) -> None:
        self.model, self.progress, self.batch_idx, self.index = model, progress, batch_idx, index
        self.sources = {n: DomainBatch(model, n, "source", d, self) for n, d in data.get("sources", {}).items()}
        target, held_out = data.get("target"), data.get("held_out")
        name = model.target_name
        self.target = None if target is None else DomainBatch(model, name, "target", target, self)
        self.held_out = None if held_out is None else DomainBatch(model, name, "held_out", held_out, self)
        labelled = data.get("labelled")
        self.labelled = None if labelled is None else DomainBatch(model, name, "labelled", labelled, self)
        self.joint = [*self.sources.values(), *(b for b in (self.target, self.labelled) if b is not None)]
        self.objectives: dict[str, Tensor] = {}
        self.gate: list[Tensor] = []
        self.updated = False
        self.cache: dict[str, Any] = {}

    @property
    def source(self) -> DomainBatch | None:
        """The first source, or None in a source-free run."""
        return next(iter(self.sources.values()), None)

    def pooled(self, attribute: str) -> Tensor:
        """Concatenation of ``"features"``, ``"logits"``, ``"x"`` or ``"y"`` over all sources."""
        parts = [getattr(b, attribute) for b in self.sources.values()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def domain_mean(self, per_source: dict[str, Tensor]) -> Tensor:
        """Mean of one scalar a source, so that the number of sources does not change the weight."""
        values = list(per_source.values())
        return values[0] if len(values) == 1 else torch.stack(values).mean()
