"""The contract of a test-time method: what to write, what the adapter gives, and what it keeps.

A method is one module of this package (or any importable class) with a subclass of :class:`Method`. It is found by its
class name, without registration; others give a class path. Four calls, in this order:

1. ``attach(a)``: once. Surgery (:meth:`Adapter.replace`: recorded, and undone in :meth:`Adapter.export`), further
   modules (:meth:`Adapter.add`: a projector, ``add("teacher", a.copy())``), and what is trained
   (:meth:`Adapter.train_parameters`).
2. ``prepare(a, source)``: once, only where ``needs`` says so: Fisher information, prototypes, warm-up of adapters. It
   may train ``a.net`` and added modules, and writes constants of the stream into ``a.prepared`` (tensors and numbers,
   no samples). :meth:`Adapter.save_prepared` writes the outcome to a file, from which a stream starts without source
   data. A warm-up that trained other parameters calls ``train_parameters`` again at its end.
3. ``step(a, x)``: each batch; the detached or attached logits that count. ``scored`` says which forward that is.
4. ``predict(a, x)``: without an update, under ``no_grad``: beyond the budget of updates, and after a rollback.

**State.** The object itself holds constructor arguments alone; one object serves several adapters. What changes along
the stream lives in trained parameters, in buffers and added modules, or in ``a.state`` (nested dicts and lists of
tensors and numbers: memories, moving averages, queues). All of it, the optimiser and the generator are in
:meth:`Adapter.snapshot`, so that a resumed stream repeats an undisturbed one bit for bit. Frozen parameters of
``a.net`` must not be written to. No batch size is sure: one sample works, or is refused by name.

**Randomness.** Only from ``a.generator`` (on the CPU: draw there, then move), or by :meth:`Adapter.rand_like`.

**Views.** ``a.view(x)`` augments as CoTTA does, ``a.view(x, make)`` by ``make(pixels, generator) -> pixels``: pixels
are un-normalised (by the adapter's ``mean`` and ``std``) in [0, 1]. Feature rows ``[B, D]`` come with noise instead.

**Updates.** ``a.update(loss)`` is ``a.backward(loss)`` and ``a.optimizer_step()``; what needs gradients, or restores
weights, goes between or after. ``a.reset_weights()`` returns to the start of the stream (its generator goes on): an
episodic method calls it before each sample.

**Side information.** ``a(x, side={...})`` is ``a.side`` during the call: a signal beside the images.

**Order of the phases.** Augmented copies, anchors and teachers that should start from the prepared net are added in
``attach`` and brought up to date at the end of ``prepare`` (``load_state_dict``): a file is loaded into what ``attach``
made, so sizes are fixed there. ``a.features`` gives the classifier's inputs, also of a copy of the net.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from uda_testtime.adapter import Adapter
    from uda_testtime.source import SourceSamples

Needs = Literal["nothing", "inputs", "labels", "domains"]


class Method:
    """What adapts. All that changes lives in the adapter, so that one object serves several."""

    #: keeps nothing from batch to batch, so that several processes give the same results as one
    averages: ClassVar[bool] = False
    #: returns to the start of the stream within a step, for each sample
    episodic: bool = False
    #: of the source, once before the stream: ``inputs``, ``labels`` with them, or ``domains`` as well; an object whose
    #: arguments decide sets its own
    needs: Needs = "nothing"
    #: the forward whose logits count
    scored: str = "before the update"

    def told(self) -> dict[str, Any]:
        """Name and arguments in plain types: which method a file was made by."""
        plain = (bool, int, float, str, list, dict, type(None))

        def simple(value: Any) -> Any:
            return value.told() if isinstance(value, Method) else value if isinstance(value, plain) else repr(value)

        return {"method": type(self).__name__, **{name: simple(value) for name, value in vars(self).items()}}

    def attach(self, a: Adapter) -> None:
        """Change ``a.net`` and name what is trained, once before the stream."""

    def prepare(self, a: Adapter, source: SourceSamples) -> None:
        """Once before the stream, with source samples: writes ``a.prepared``, may train."""

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The base prediction ``[B, C]``: without an update."""
        return a.net(x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Adapt to a batch ``[B, ...]``; the logits ``[B, C]`` that count."""
        return self.predict(a, x)


def other_arguments(found: dict[str, Any], mine: dict[str, Any]) -> str:
    """Which of :meth:`Method.told` differ, in words; empty: none."""
    names = [k for k in {**found, **mine} if found.get(k) != mine.get(k)]
    return ", ".join(f"{k}: {found.get(k)!r}, now {mine.get(k)!r}" for k in names)


@dataclass(frozen=True)
class Guard:
    """When to go back to the source: predictions of one class, parameters far away, or NaN.

    Args:
        window: samples looked at.
        top_share: largest share of the window that one predicted class may have. A stream sorted by class has such
            windows by nature: set 1 there.
        drift: largest ``|theta - theta_0| / |theta_0|`` over the trained parameters, without those that start at zero.
    """

    window: int = 256
    top_share: float = 0.9
    drift: float = 1.0
