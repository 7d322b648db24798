"""What each process of the distributed check does."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def load_module(name: str, file: str) -> None:
    """Import a module by name, or from its file under that name where no package leads there."""
    try:
        module = importlib.import_module(name)
        if os.path.realpath(getattr(module, "__file__", None) or "") == os.path.realpath(file):
            return
    except ImportError:
        pass
    parts = name.split(".")
    for i in range(1, len(parts)):  # pickle looks a class up through its parents
        parent = ".".join(parts[:i])
        if parent not in sys.modules:
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[parent].__path__ = []
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def digest(value: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    data = value.detach().cpu().contiguous()
    return hashlib.sha256(
        data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
    ).hexdigest()


def batch_statistics(model: nn.Module) -> set[str]:
    """Names of BatchNorm's buffers: each rank has its own between two forwards, by design of DDP."""
    return {
        f"{n}.{b}"
        for n, m in model.named_modules()
        if isinstance(m, _BatchNorm)
        for b, _ in m.named_buffers(recurse=False)
    }


class Fingerprints(L.Callback):
    """Hash of every parameter and buffer after each batch."""

    def __init__(self) -> None:
        self.batches: list[dict[str, str]] = []

    def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *_: Any) -> None:
        """Take the fingerprints."""
        skip = batch_statistics(model)
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.batches.append({k: digest(v) for k, v in state.items() if k not in skip})


def main(payload: str) -> None:
    """Train each case under DDP, in order, and write the fingerprints of this rank."""
    given = json.loads(Path(payload).read_text())
    sys.path[:0] = [p for p in given["sys_path"] if p not in sys.path]
    torch.set_num_threads(1)
    for case in given["cases"]:
        for name, file in case["modules"]:
            load_module(name, file)
        bench = pickle.loads(Path(case["bench"]).read_bytes())
        seen = Fingerprints()
        strategy = "ddp_find_unused_parameters_true" if case["unused"] else "ddp"
        bench.train(bench.built(), devices=2, strategy=strategy, callbacks=[seen])
        Path(f"{case['out']}{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(seen.batches))
