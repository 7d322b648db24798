"""An adapter around any classifier: one call adapts to a batch and predicts it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from uda.errors import UDAError
from uda_testtime import views
from uda_testtime.checks import check_batch, check_head, check_model, check_optimizer
from uda_testtime.method import Guard, Method
from uda_testtime.prepared import Prepared
from uda_testtime.surgery import replace_modules, undo

__all__ = ["Adapter", "Guard", "Method"]


class Adapter(Prepared):
    """Adapt a copy of a classifier to a stream, batch by batch.

    Args:
        model: gives logits ``[B, C]``; it is left alone.
        method: what adapts.
        head: name of the classifier layer, whose input are the features; None: the last Linear.
        guard: rolls back to the state before the stream; None: only a NaN does.
        updates_per_batch: budget: at most so many updates a batch, also a fraction (0.25: each fourth); None: no bound.
        seed: of the method's random numbers.
        mean, std: of the channels, with which inputs are normalised: augmented views work on pixels in [0, 1].

    Raises:
        UDAError: a compiled model, a model that lacks the layers which the method needs, several processes.
    """

    @torch.inference_mode(False)
    def __init__(
        self, model: nn.Module, method: Method, head: str | None = None, guard: Guard | None = None,
        updates_per_batch: float | None = None, seed: int = 0, mean: float | list[float] | None = None,
        std: float | list[float] | None = None,
    ) -> None:  # fmt: skip
        check_model(model)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not method.averages:
            raise UDAError(f"{type(method).__name__} would drift apart on several processes: use one.")
        self.net, self.method, self.guard = copy.deepcopy(model).eval().requires_grad_(False), method, guard
        linears = [n for n, m in self.net.named_modules() if isinstance(m, nn.Linear)]
        self.head = head or (linears[-1] if linears else None)
        self.extra = nn.ModuleDict()  # what the method adds
        self.optimizer: torch.optim.Optimizer | None = None
        self.parameters: list[nn.Parameter] = []
        self.updates_per_batch, self._credit = updates_per_batch, 0.0
        self.batches = self.updates = self.rollbacks = 0
        self.state: dict[str, Any] = {}  # of the method: tensors and numbers
        self.prepared: dict[str, Any] = {}  # of the method: constants of the stream
        self.side: dict[str, Any] = {}
        self.generator, self.scale = torch.Generator().manual_seed(seed), views.PixelScale(mean, std)
        self._surgery: list[dict[str, nn.Module]] = []
        self._seen: deque[int] = deque(maxlen=guard.window if guard else 1)
        self._shape: tuple[int, ...] | None = None
        self._fingerprint = self.fingerprint() if method.needs != "nothing" else ""
        method.attach(self)
        self.ready = method.needs == "nothing"
        self._start = self.snapshot()

    # ------------------------------------------------------------------------------ what a method works with

    def replace(self, pick: Callable[[nn.Module], bool], make: Callable[[nn.Module], nn.Module]) -> int:
        """Put ``make(layer)`` in the place of each layer of the net that is picked; how many. Undone by ``export``."""
        self._surgery.append(replace_modules(self.net, pick, make))
        return len(self._surgery[-1])

    def add(self, name: str, module: nn.Module, trained: bool = False) -> nn.Module:
        """Take a module along in snapshots, as ``a.extra[name]``: a teacher, a projector; frozen unless ``trained``."""
        reference = next(iter(self.net.parameters()), None)
        module = module.to(reference.device) if reference is not None else module
        self.extra[name] = module.eval().requires_grad_(trained)
        return module

    def copy(self) -> nn.Module:
        """A frozen copy of the net as it is now."""
        return copy.deepcopy(self.net).eval().requires_grad_(False)

    def train_parameters(
        self, parameters: list[nn.Parameter] | list[dict[str, Any]], optimizer: str, lr: float, **options: Any
    ) -> None:
        """Name what is trained; a second call replaces the first.

        Args:
            parameters: of the net and of added modules, or optimiser groups of them; optimizer: ``adam`` (0.9, 0.999),
                ``adamw`` or ``sgd`` (momentum 0.9); lr: learning rate; **options: of the optimiser.
        """
        kind, defaults = check_optimizer(optimizer)
        groups = [p if isinstance(p, dict) else {"params": [p]} for p in parameters]
        for p in self.parameters:
            p.requires_grad_(False)
        self.parameters = [p.requires_grad_() for group in groups for p in group["params"]]
        self.optimizer = kind(
            parameters if parameters and isinstance(parameters[0], dict) else self.parameters,
            lr=lr, **{**defaults, **options},
        )  # fmt: skip

    def features(self, x: Tensor, net: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` (the classifier's input) and logits ``[B, C]`` of one forward, also of a copy."""
        net, kept = net or self.net, []
        head = net.get_submodule(check_head(self.head, "Features"))
        handle = head.register_forward_pre_hook(lambda m, args: kept.append(args[0]))
        try:
            logits = net(x)
        finally:
            handle.remove()
        return kept[-1], logits

    def view(self, x: Tensor, make: views.Make | None = None) -> Tensor:
        """An augmented view ``[B, ...]`` by the adapter's generator; ``make`` as in :func:`uda_testtime.views.view`."""
        return views.view(x, self.scale, self.generator, make)

    def rand_like(self, x: Tensor) -> Tensor:
        """Uniform numbers in [0, 1) of the shape, type and device of ``x``."""
        return torch.rand(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss`` alone."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()

    def optimizer_step(self) -> None:
        """Step along the gradients there are."""
        self.optimizer.step()
        self.updates += 1

    def update(self, loss: Tensor) -> None:
        """One optimiser step."""
        self.backward(loss)
        self.optimizer_step()

    # ----------------------------------------------------------------------------------------- the stream

    def __call__(self, x: Tensor, side: dict[str, Any] | None = None) -> Tensor:
        """Adapt to a batch ``[B, ...]``; detached logits ``[B, C]`` of the prediction that counts.

        Args:
            x: inputs; side: what comes beside them, for methods that say so.

        Raises:
            UDAError: no sample, another shape than before, NaN or infinite inputs, float16 autocast, a method that was
                not made ready.
        """
        self.check_ready()
        self._shape = check_batch(x, self._shape)
        self.side = side or {}
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
        # what starts at zero, such as a prompt or an adapter, has no size to compare with
        pairs = [(p, q) for p, q in zip(self.parameters, self._start["parameters"], strict=True) if bool(q.any())]
        gap = sum(float((p - q).square().sum()) for p, q in pairs)
        return gap > self.guard.drift**2 * sum(float(q.square().sum()) for _, q in pairs)

    @torch.inference_mode(False)
    def snapshot(self) -> dict[str, Any]:
        """All that a stream changes, for :meth:`restore` or ``torch.save``; a stream resumed from it goes on alike."""
        state = {
            "parameters": [p.detach().clone() for p in self.parameters],
            "buffers": {n: b.clone() for n, b in self.net.named_buffers()},
            "extra": {n: v.clone() for n, v in self.extra.state_dict().items()},
            "optimizer": copy.deepcopy(self.optimizer.state_dict()) if self.optimizer else None,
            "method": copy.deepcopy(self.state),
            "generator": self.generator.get_state(),
        }
        counts = {n: getattr(self, n) for n in ("batches", "updates", "rollbacks", "_credit")}
        return {**state, "counts": counts, "seen": list(self._seen), "shape": list(self._shape or [])}

    def restore(self, state: dict[str, Any]) -> None:
        """Take a snapshot in."""
        self._restore_weights(state)
        for name, value in state["counts"].items():
            setattr(self, name, value)
        self._seen = deque(state["seen"], maxlen=self._seen.maxlen)
        self._shape = tuple(state["shape"]) or None
        self.generator.set_state(state["generator"].cpu())

    @torch.inference_mode(False)
    @torch.no_grad()
    def _restore_weights(self, state: dict[str, Any]) -> None:
        for p, q in zip(self.parameters, state["parameters"], strict=True):
            p.copy_(q)
            p.grad = None
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state["buffers"][name])
        self.extra.load_state_dict(state["extra"])
        if self.optimizer is not None:  # a copy: the optimiser would write into the snapshot
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.state = copy.deepcopy(state["method"])

    def reset(self) -> None:
        """Parameters, buffers, optimiser, method state, generator and counts as before the stream, bit for bit."""
        self.restore(self._start)

    def reset_weights(self) -> None:
        """Parameters, buffers, added modules, optimiser and method state as before the stream; the rest goes on."""
        self._restore_weights(self._start)

    def export(self) -> nn.Module:
        """A copy of the net with what was learned and without the surgery: layers are the kinds that the model has."""
        net, surgery = copy.deepcopy((self.net, self._surgery))
        for layers in reversed(surgery):
            undo(net, layers)
        return net.requires_grad_(True)
