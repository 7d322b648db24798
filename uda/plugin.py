"""What a method is: an ``nn.Module`` whose marked methods fill the hooks of :mod:`uda.hookspecs`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import pluggy
import torch
from torch import Tensor, nn

from uda.described import Described

#: Version of the hook contract. A plugin distribution names the version that it was written for.
HOOK_API = 1
hookspec = pluggy.HookspecMarker("uda")
hookimpl = pluggy.HookimplMarker("uda")

SETTINGS = (
    "closed", "partial", "open", "universal", "multi-source", "source-free", "test-time", "heterogeneous",
    "semi-supervised", "multi-label",
)  # fmt: skip


@dataclass(frozen=True)
class DataNeeds:
    """What a method asks of the data module; the union over all plugins is built, and nothing more.

    Attributes:
        source: labelled source batches. One plugin with ``False`` makes the run source-free.
        target: unlabelled target batches.
        held_out: batches of a target share that no objective trains on (``step.held_out``).
        views: target views beside ``x``: ``"weak"``, ``"strong"``.
        source_views: source views beside ``x``.
        class_balanced: source batches with equally many samples of each class.
        refresh: domain roles (``"source"``, ``"target"``) whose whole pool :func:`refresh` wants to see.
        refresh_every: steps between two refreshes; 0 is once, at the start of each epoch.
    """

    source: bool = True
    target: bool = True
    held_out: bool = False
    views: frozenset[str] = frozenset()
    source_views: frozenset[str] = frozenset()
    class_balanced: bool = False
    refresh: frozenset[str] = frozenset()
    refresh_every: int = 0

    def __post_init__(self) -> None:
        for name in ("views", "source_views", "refresh"):
            value = getattr(self, name)
            object.__setattr__(self, name, frozenset([value] if isinstance(value, str) else value))
        if unknown := (self.views | self.source_views) - {"weak", "strong"}:
            raise ValueError(f"Unknown views {sorted(unknown)}: a data module offers 'weak' and 'strong'.")
        if unknown := self.refresh - {"source", "target"}:
            raise ValueError(f"Unknown roles {sorted(unknown)} in refresh: use 'source' and 'target'.")

    @staticmethod
    def union(needs: Iterable[DataNeeds]) -> DataNeeds:
        """Needs of a run; with no plugin at all only the source is needed (source-only training)."""
        needs = list(needs)
        every = [n.refresh_every for n in needs if n.refresh_every > 0]
        return DataNeeds(
            source=all(n.source for n in needs),
            target=any(n.target for n in needs),
            held_out=any(n.held_out for n in needs),
            views=frozenset().union(*(n.views for n in needs)),
            source_views=frozenset().union(*(n.source_views for n in needs)),
            class_balanced=any(n.class_balanced for n in needs),
            refresh=frozenset().union(*(n.refresh for n in needs)),
            refresh_every=min(every, default=0),
        )


@dataclass
class PseudoLabels:
    """Labels that a method gives the target batch.

    Attributes:
        y: class ids ``[B]``.
        weight: weight of each sample ``[B]`` in [0, 1], or None for 1.
        soft: class distribution ``[B, C]``, or None for the one-hot of ``y``.
        keep: boolean mask ``[B]`` of the samples worth training on, or None for all.
    """

    y: Tensor
    weight: Tensor | None = None
    soft: Tensor | None = None
    keep: Tensor | None = None

    def __post_init__(self) -> None:
        for f in fields(self):  # a pseudo-label is a constant of the step: no gradient may flow into it
            value = getattr(self, f.name)
            if value is not None:
                setattr(self, f.name, value.detach())


@dataclass
class Prediction:
    """What inference returns.

    Attributes:
        label: class ids ``[B]`` in [0, C), also of samples that are marked as unknown.
        score: confidence ``[B]`` in [0, 1].
        unknown: mask ``[B]`` of the samples that are of no class of the source, or None for none.
        unknown_score: how unknown a sample is ``[B]``, larger is more, on any scale; None: ``1 - score``. Metrics
            read its order alone.
    """

    label: Tensor
    score: Tensor
    unknown: Tensor | None = None
    unknown_score: Tensor | None = None

    @property
    def unknown_scores(self) -> Tensor:
        """``unknown_score``, or ``1 - score`` where it is None ``[B]``."""
        return 1 - self.score if self.unknown_score is None else self.unknown_score

    def rejecting(self, unknown: Tensor, score: Tensor) -> Prediction:
        """The same with the samples of a mask ``[B]`` as unknown too, and another ``unknown_score`` ``[B]``.

        What the hook ``reject`` returns where several methods may have their say: what one marked stays marked.
        """
        mask = unknown if self.unknown is None else unknown | self.unknown
        return replace(self, unknown=mask, unknown_score=score)

    def marked(self, num_classes: int) -> Tensor:
        """Labels ``[B]`` with ``num_classes`` for the unknown."""
        return self.label if self.unknown is None else torch.where(self.unknown, num_classes, self.label)


class Plugin(Described, nn.Module):
    """Base class of a method.

    Mark each method that fills a hook with :data:`uda.hookimpl`; a marked method that is no hook is an error.
    Parameters, buffers and extra state are in the checkpoint. Constructor arguments are plain numbers and
    names (they are the YAML keys); what depends on sizes is made in the hook ``build``.
    """

    #: Label-set and data settings that the method serves, from :data:`SETTINGS`.
    settings: ClassVar[tuple[str, ...]] = ("closed",)
    #: Steps the optimisers itself through the hook ``optimise``.
    manual: ClassVar[bool] = False
    #: Its objectives reach the backbone by another way than ``features`` (it runs the backbone again), so
    #: that weighted gradients must be taken on parameters.
    reruns_backbone: ClassVar[bool] = False
    #: Leaves some of its parameters without a gradient in some steps (DDP must search for them).
    unused_parameters: ClassVar[bool] = False
    #: ``adapt`` is safe under several processes, since it averages what it learns over them.
    averages: ClassVar[bool] = False

    def start_files(self) -> list[str]:
        """Checkpoints of trained models that the plugin brings into the network: where a target without labels and no
        source tell no class, theirs are those of the run."""
        return []
    #: Search space for tuning without labels: argument -> (low, high[, "log"]) or list of choices.
    search_space: ClassVar[dict[str, Any]] = {}

    #: Key in ``model.plugins``; set when a model takes the plugin in.
    key: str = ""

    def log_later(self, **values: Tensor | float | Callable[[], Tensor | float]) -> None:
        """Leave diagnostic scalars of this step for the logger (``<key>/<name>``); never part of the loss.

        A function is called only in the steps that are logged, which is most often one in fifty. What the hook
        ``refresh`` leaves is logged with the next of these steps, however many steps later that is.
        """
        self.__dict__.setdefault("_diagnostics", {}).update(values)

    def take_diagnostics(self) -> dict[str, Tensor | float]:
        """Diagnostics since the last call, and forget them."""
        found = self.__dict__.pop("_kept", {}) | self.__dict__.pop("_diagnostics", {})
        with torch.no_grad():
            values = {k: v() if callable(v) and not isinstance(v, torch.Tensor) else v for k, v in found.items()}
        return {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()}

    def drop_diagnostics(self) -> None:
        """Forget diagnostics of a step that is not logged."""
        self.__dict__.pop("_diagnostics", None)

    def keep_diagnostics(self) -> None:
        """Keep the present diagnostics for the next step that is logged; functions are called now."""
        self._kept = self.take_diagnostics()
