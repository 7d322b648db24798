"""One walk along a stream: predict, adapt, keep the figures; stop anywhere and go on, bit for bit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uda.errors import UDAError
from uda_testtime.adapter import Adapter
from uda_testtime.method import other_arguments
from uda_testtime.streams import Stream, StreamBatch

FORMAT = "uda-testtime walk 1"


def start_stream(adapter: Adapter, stream: Stream) -> None:
    """Check that an adapter can walk a stream, before its first batch; nothing changes.

    Raises:
        UDAError: a method that was not made ready, inputs that the model refuses, or logits of the wrong form.
    """
    adapter.check_ready()
    before, x = adapter.snapshot(), stream[0].x[:2]
    try:
        with torch.no_grad():
            logits = adapter.net(place(adapter, x))
    except Exception as error:
        raise UDAError(f"The model does not take inputs of shape {tuple(x.shape[1:])}: {error}") from error
    finally:
        adapter.restore(before)
    if logits.dim() != 2 or not bool(torch.isfinite(logits).all()):
        raise UDAError(f"The model gives {tuple(logits.shape)} for two samples, not finite logits [B, C].")
    known = max((int(y.max()) for y in stream.labels), default=-1)
    if known >= logits.shape[1]:
        raise UDAError(f"The stream has labels up to {known}, the model {logits.shape[1]} classes.")


def place(adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """Inputs where the model is."""
    reference = next(adapter.net.parameters(), None)
    return x if reference is None else x.to(reference.device)


class Walk:
    """A pass of an adapter along a stream.

    Args:
        adapter: at its start, made ready if its method needs that.
        stream: what comes.
        autocast: dtype of automatic mixed precision; None: none. float16 is refused.

    Attributes:
        labels, scores: prediction and its confidence by position in the stream, ``[N]``, -1 where not yet walked.
        logs: a row a batch: number, samples, seconds, updates, rollbacks, and what only an evaluation may read:
            ``oracle_errors`` and ``oracle_known``.
    """

    def __init__(self, adapter: Adapter, stream: Stream, autocast: torch.dtype | None = None) -> None:
        start_stream(adapter, stream)
        self.adapter, self.stream, self.autocast = adapter, stream, autocast
        self.labels = np.full(len(stream.rows), -1)
        self.scores = np.zeros(len(stream.rows), dtype=np.float64)
        self.done, self.logs = 0, []

    @property
    def finished(self) -> bool:
        """Whether all batches were walked."""
        return self.done == len(self.stream)

    def step(self) -> StreamBatch:
        """The next batch."""
        batch, a = self.stream[self.done], self.adapter
        if batch.border:
            a.reset_weights()
        updates, rollbacks, start = a.updates, a.rollbacks, time.perf_counter()
        x = place(a, batch.x)
        with torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None):
            logits = a(x)
        score, label = logits.float().softmax(1).max(1)
        at = slice(*self.stream._bounds[self.done])
        self.labels[at], self.scores[at] = label.cpu().numpy(), score.cpu().numpy()
        known = batch.y >= 0
        self.logs.append({
            "batch": self.done, "shift": self.stream.shifts[batch.rows[0, 0]].name, "samples": len(batch.rows),
            "seconds": time.perf_counter() - start, "updates": a.updates - updates,
            "rollbacks": a.rollbacks - rollbacks, "oracle_known": int(known.sum()),
            "oracle_errors": int((self.labels[at] != batch.y)[known].sum()),
        })  # fmt: skip
        self.done += 1
        return batch

    def run(self, batches: int | None = None) -> Walk:
        """Walk on, to the end or for so many batches."""
        left = len(self.stream) - self.done if batches is None else min(batches, len(self.stream) - self.done)
        for _ in range(left):
            self.step()
        return self

    def figures(self) -> dict[str, Any]:
        """What the walk came to so far. ``oracle_``: made of labels, for evaluation alone; in %."""
        s = self.stream
        truth = np.array([s.labels[i][j] for i, j in s.rows])
        seen = (self.labels >= 0) & (truth >= 0)
        wrong = self.labels != truth
        by_shift = {}
        for i, shift in enumerate(s.shifts):
            mine = seen & (s.rows[:, 0] == i)
            if mine.any():  # a shift that comes twice (gradual) is one
                by_shift.setdefault(shift.name, []).append((int(wrong[mine].sum()), int(mine.sum())))
        totals = {n: np.sum(v, axis=0) for n, v in by_shift.items()}
        seconds = [r["seconds"] for r in self.logs]
        return {
            "batches": self.done, "samples": int((self.labels >= 0).sum()),
            "oracle_error": 100 * float(wrong[seen].mean()) if seen.any() else None,
            "oracle_error_by_shift": {n: 100 * float(e / k) for n, (e, k) in totals.items()},
            "oracle_shift_mean_error": (
                float(np.mean([100 * e / k for e, k in totals.values()])) if totals else None
            ),
            "updates": self.adapter.updates, "rollbacks": self.adapter.rollbacks,
            "seconds_a_batch": float(np.median(seconds)) if seconds else None,
        }  # fmt: skip

    # ------------------------------------------------------------------------------------------- its state

    def save(self, path: str | Path) -> None:
        """Write the state, whole or not at all; it loads with ``weights_only``."""
        content = {
            "format": FORMAT, "stream": self.stream.fingerprint(), "method": type(self.adapter.method).__name__,
            "arguments": self.adapter.method.told(),
            "done": self.done, "labels": torch.from_numpy(self.labels), "scores": torch.from_numpy(self.scores),
            "logs": self.logs, "adapter": self.adapter.snapshot(),
        }  # fmt: skip
        beside = Path(f"{path}.part")
        torch.save(content, beside)
        os.replace(beside, path)

    def load(self, path: str | Path) -> None:
        """Go on from a state.

        Raises:
            UDAError: no state, or that of another method, model or stream.
        """
        try:
            found = torch.load(path, map_location=place(self.adapter, torch.empty(0)).device, weights_only=True)
        except Exception as error:
            raise UDAError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise UDAError(f"{path} is no state of a stream.")
        name = type(self.adapter.method).__name__
        if found["method"] != name:
            raise UDAError(f"{path} is the state of {found['method']}, not of {name}.")
        if other := other_arguments(found.get("arguments", {}), self.adapter.method.told()):
            raise UDAError(f"{path} is a state of other arguments of {name} ({other}): repeat those it began with.")
        if found["stream"] != self.stream.fingerprint():
            raise UDAError(f"{path} is the state of another stream: data, setting, batch size, seed or limit differ.")
        try:
            self.adapter.restore(found["adapter"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UDAError(f"{path} does not fit the model or the method's arguments: {error}") from error
        self.done, self.logs = found["done"], found["logs"]
        self.labels, self.scores = found["labels"].cpu().numpy(), found["scores"].cpu().numpy()
