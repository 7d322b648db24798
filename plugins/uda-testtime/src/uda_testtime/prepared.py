"""The phase before a stream, with source data once, and its file, which holds none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from uda.errors import UDAError
from uda_testtime.method import other_arguments

if TYPE_CHECKING:
    from uda_testtime.method import Method
    from uda_testtime.source import SourceSamples


class Prepared:
    """Of :class:`~uda_testtime.Adapter`: make a method ready, save it, start from the file."""

    net: nn.Module
    extra: nn.ModuleDict
    method: Method
    prepared: dict[str, Any]
    ready: bool
    _fingerprint: str
    _start: dict[str, Any]

    def prepare(self, source: SourceSamples) -> None:
        """Make the method ready with source samples; the stream starts from what comes out.

        Raises:
            UDAError: labels or domains that the method needs are missing.
        """
        needs, name = self.method.needs, type(self.method).__name__
        if needs == "nothing":
            return
        if needs in ("labels", "domains") and source.y is None:
            raise UDAError(f"{name} needs the labels of its source samples.")
        if needs == "domains" and (source.domain is None or len(source.domain.unique()) < 2):
            raise UDAError(f"{name} needs samples of several source domains, and the number of each.")
        with torch.inference_mode(False), torch.enable_grad():
            self.method.prepare(self, source)
        self.begin()

    def begin(self) -> None:
        """The present state is the start of the stream."""
        self.ready = True
        self._start = self.snapshot()

    def check_ready(self) -> None:
        """Refuse a method that lacks its source statistics."""
        if not self.ready:
            raise UDAError(
                f"{type(self.method).__name__} has to be made ready with source samples once: Adapter.prepare(source), "
                "or Adapter.load_prepared(file)."
            )

    def fingerprint(self) -> str:
        """Of the source model's parameters and buffers."""
        digest = hashlib.sha256()
        for name, value in self.net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save_prepared(self, path: str | Path) -> None:
        """Write what a stream needs beside the source model; it loads with ``weights_only`` and holds no sample."""
        self.check_ready()
        content = {
            "format": "uda-testtime 1", "method": type(self.method).__name__, "model": self._fingerprint,
            "arguments": self.method.told(), "net": self.net.state_dict(), "start": self._start,
            "prepared": self.prepared,
        }  # fmt: skip
        torch.save(content, path)

    def load_prepared(self, path: str | Path) -> None:
        """Start from a file of :meth:`save_prepared`.

        Raises:
            UDAError: no such file, or one of another method, model or other arguments.
        """
        name = type(self.method).__name__
        try:
            device = next((v.device for v in self.net.state_dict().values()), "cpu")
            found = torch.load(path, map_location=device, weights_only=True)
        except Exception as error:
            raise UDAError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(found, dict) or found.get("format") != "uda-testtime 1":
            raise UDAError(f"{path} is no file of a method that was made ready.")
        for what, mine in (("method", name), ("model", self._fingerprint)):
            if found[what] != mine:
                told = f"{found[what]}, not {mine}" if what == "method" else "another source model"
                raise UDAError(f"{path} was made for {told}: make it ready again.")
        if other := other_arguments(found.get("arguments", {}), self.method.told()):
            raise UDAError(f"{path} was made with other arguments of {name} ({other}): make it ready again.")
        try:
            self.net.load_state_dict(found["net"])
            self.prepared = found["prepared"]
            self.restore(found["start"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UDAError(f"{path} was made with other arguments of {name}: {error}") from error
        self.begin()
