"""An adapter around any classifier: one call adapts to a batch and predicts it."""

from __future__ import annotations

import copy
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uda.errors import UDAError


class Method:
    """What adapts. All that changes lives in the adapter, so that one object serves several."""

    #: keeps nothing from batch to batch, so that several processes give the same results as one
    averages = False

    def attach(self, a: Adapter) -> None:
        """Change ``a.net`` and name what is trained (:meth:`Adapter.train_parameters`), once before the stream."""

    def predict(self, a: Adapter, x: Tensor) -> Tensor:
        """The base prediction ``[B, C]``: without an update."""
        return a.net(x)

    def step(self, a: Adapter, x: Tensor) -> Tensor:
        """Adapt to a batch; the logits ``[B, C]`` that count."""
        return self.predict(a, x)


@dataclass(frozen=True)
class Guard:
    """When to go back to the source: predictions of one class, parameters far away, or NaN.

    Args:
        window: samples looked at.
        top_share: largest share of the window that one predicted class may have. A stream sorted by class has such
            windows by nature: set 1 there.
        drift: largest ``|theta - theta_0| / |theta_0|`` over the trained parameters.
    """

    window: int = 256
    top_share: float = 0.9
    drift: float = 1.0


class Adapter:
    """Adapt a copy of a classifier to a stream, batch by batch.

    Args:
        model: gives logits ``[B, C]``; it is left alone.
        method: what adapts.
        head: name of the classifier layer, whose input are the features; None: the last Linear.
        guard: rolls back to the state before the stream; None: only a NaN does.
        updates_per_batch: budget: at most so many updates a batch, also a fraction (0.25: each fourth); None: no bound.

    Raises:
        UDAError: a compiled model, a model that lacks the layers which the method needs, several processes.
    """

    def __init__(
        self, model: nn.Module, method: Method, head: str | None = None, guard: Guard | None = None,
        updates_per_batch: float | None = None,
    ) -> None:  # fmt: skip
        if hasattr(model, "_orig_mod"):
            raise UDAError("Adapter: give the model itself, not the result of torch.compile: its layers are replaced.")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not method.averages:
            raise UDAError(f"{type(method).__name__} would drift apart on several processes: use one.")
        self.net, self.method, self.guard = copy.deepcopy(model).eval().requires_grad_(False), method, guard
        linears = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        self.head = head or (linears[-1] if linears else None)
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: list[nn.Parameter] = []
        self.updates_per_batch, self._credit = updates_per_batch, 0.0
        self.batches = self.updates = self.rollbacks = 0
        self.state: dict[str, Any] = {}  # of the method: tensors and numbers
        self._seen: deque[int] = deque(maxlen=guard.window if guard else 1)
        self._shape: tuple[int, ...] | None = None
        method.attach(self)
        self._start = self.snapshot()

    def train_parameters(self, parameters: list[nn.Parameter], optimizer: str, lr: float) -> None:
        """Name what is trained: ``adam`` (0.9, 0.999) or ``sgd`` (momentum 0.9), no weight decay."""
        self.parameters = [p.requires_grad_() for p in parameters]
        if optimizer == "adam":
            self.optimizer = torch.optim.Adam(self.parameters, lr=lr)
        elif optimizer == "sgd":
            self.optimizer = torch.optim.SGD(self.parameters, lr=lr, momentum=0.9)
        else:
            raise UDAError(f"unknown optimizer {optimizer!r}: use adam or sgd.")

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` (the classifier's input) and logits ``[B, C]`` of one forward."""
        if self.head is None:
            raise UDAError("The model has no Linear: name its classifier by Adapter(head=...).")
        kept: list[Tensor] = []
        handle = self.net.get_submodule(self.head).register_forward_pre_hook(lambda m, args: kept.append(args[0]))
        try:
            logits = self.net(x)
        finally:
            handle.remove()
        return kept[-1], logits

    def update(self, loss: Tensor) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.updates += 1

    def __call__(self, x: Tensor) -> Tensor:
        """Adapt to a batch ``[B, ...]``; detached logits ``[B, C]`` of the prediction that counts.

        Raises:
            UDAError: no sample, another shape than before, NaN or infinite inputs, float16 autocast.
        """
        self._check(x)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone()  # an inference tensor cannot be trained on
            out = self.method.step(self, x).detach() if self._may_update() else self._plain(x)
            self.batches += 1
            if self._bad(out):
                self.reset_weights()
                self.rollbacks += 1
                self._seen.clear()
                out = self._plain(x)
        return out

    @torch.no_grad()
    def _plain(self, x: Tensor) -> Tensor:
        return self.method.predict(self, x)

    def _may_update(self) -> bool:
        if self.updates_per_batch is None:
            return True
        self._credit = min(self._credit + self.updates_per_batch, max(1.0, self.updates_per_batch))
        if self._credit < 1:
            return False
        self._credit -= 1
        return True

    def _check(self, x: Tensor) -> None:
        if len(x) == 0:
            raise UDAError("Adapter: the batch is empty.")
        if self._shape is not None and tuple(x.shape[1:]) != self._shape:
            raise UDAError(f"Adapter: inputs of shape {tuple(x.shape[1:])} after {self._shape}: resize them alike.")
        if not bool(torch.isfinite(x).all()):
            raise UDAError("Adapter: the batch has NaN or infinite inputs. Remove or impute them.")
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            raise UDAError("Adapter: float16 autocast needs loss scaling, which there is none here: use bfloat16.")
        self._shape = tuple(x.shape[1:])

    @torch.no_grad()
    def _bad(self, logits: Tensor) -> bool:
        if not bool(torch.isfinite(logits).all()) or any(not bool(torch.isfinite(p).all()) for p in self.parameters):
            return True
        if self.guard is None:
            return False
        self._seen.extend(logits.argmax(1).tolist())
        if len(self._seen) == self.guard.window:
            top = torch.bincount(torch.tensor(list(self._seen))).max().item() / self.guard.window
            if top > self.guard.top_share:
                return True
        if not self.parameters:
            return False
        start = self._start["parameters"]
        gap = sum(float((p - q).square().sum()) for p, q in zip(self.parameters, start, strict=True))
        return gap**0.5 > self.guard.drift * max(sum(float(q.square().sum()) for q in start) ** 0.5, 1e-12)

    def snapshot(self) -> dict[str, Any]:
        """All that a stream changes, for :meth:`restore` or ``torch.save``; a stream resumed from it goes on alike."""
        state = {
            "parameters": [p.detach().clone() for p in self.parameters],
            "buffers": {n: b.clone() for n, b in self.net.named_buffers()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer else None,
            "method": copy.deepcopy(self.state),
        }
        counts = {n: getattr(self, n) for n in ("batches", "updates", "rollbacks", "_credit")}
        return {**state, "counts": counts, "seen": list(self._seen)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a snapshot in."""
        self._restore_weights(state)
        for name, value in state["counts"].items():
            setattr(self, name, value)
        self._seen = deque(state["seen"], maxlen=self._seen.maxlen)

    @torch.no_grad()
    def _restore_weights(self, state: dict[str, Any]) -> None:
        for p, q in zip(self.parameters, state["parameters"], strict=True):
            p.copy_(q)
            p.grad = None
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state["buffers"][name])
        if self.optimizer is not None:  # a copy: the optimiser would write into the snapshot
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.state = copy.deepcopy(state["method"])

    def reset(self) -> None:
        """Parameters, buffers, optimiser, method state and counts as before the stream, bit for bit."""
        self.restore(self._start)

    def reset_weights(self) -> None:
        """Parameters, buffers, optimiser and method state as before the stream; counts go on."""
        self._restore_weights(self._start)
