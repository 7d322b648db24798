"""The processes of the distributed check: ``python -m uda.testing.rank <payload> <logs>`` imports, and forks a pair.

With LOCAL_RANK set it is one of them itself (where there is no fork).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import pickle
import signal
import sys
import time
import traceback
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


def child(payload: str, log: str, rank: int) -> int:
    """Fork a rank that writes to ``log``; gives its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank)}
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        main(payload)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def together(payload: str, logs: list[str]) -> int:
    """Run all ranks; where one fails, its partner, which would wait for ever, is stopped soon after.

    Returns:
        0, or 10 more than the rank that failed first.
    """
    ranks = {child(payload, log, rank): rank for rank, log in enumerate(logs)}
    failed = None
    while ranks:
        pid, status = os.wait()
        rank = ranks.pop(pid)
        if status and failed is None:
            failed = rank
            time.sleep(2)  # it may end by itself
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return 0 if failed is None else 10 + failed


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:
        main(sys.argv[1])
    else:
        sys.exit(together(sys.argv[1], sys.argv[2:]))
