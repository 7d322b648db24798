"""The summary of a run: what it reached, what label-free selection would take, and what it was made with."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import sys
import time
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch

import uda
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.described import describe
from uda.metrics.names import SOURCE_FIGURES, oracle
from uda.run.figures import figures_of, measures_of, print_table, rounded, setting_of
from uda.run.history import ObjectiveMeans, write_history
from uda.selection import monitor_value, needed_scores, running_choice, select_epoch

#: trainer settings that change no weight, and keys that hold paths of one machine
_NO_EFFECT = {
    "default_root_dir", "logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing",
    "profiler", "log_every_n_steps", "limit_test_batches", "limit_predict_batches", "inference_mode",
}  # fmt: skip
_MACHINE = {"root", "dirpath", "save_dir", "cache_dir", "num_workers", "pin_memory", "eval_batch_size"}


def config_hash(config: Mapping[str, Any]) -> str:
    """First 12 hex digits of the SHA-256 of what decides a run's weights.

    In it: ``seed_everything``, ``model``, ``data`` and ``trainer``. Left out: run directory and checkpoints,
    loggers, progress bar and other settings that change no weight, workers, and folders of one machine (keys
    ``root``, ``dirpath``, ``save_dir``, ``cache_dir``), so that two machines agree on equal runs.
    """

    def stable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(k): stable(v) for k, v in sorted(value.items()) if k not in _MACHINE}
        return [stable(v) for v in value] if isinstance(value, (list, tuple)) else value

    kept = {k: stable(config.get(k)) for k in ("seed_everything", "model", "data")}
    kept["trainer"] = stable({k: v for k, v in (config.get("trainer") or {}).items() if k not in _NO_EFFECT})
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()[:12]


def versions(model: Any) -> dict[str, str]:
    """Versions of Python, the libraries, and each distribution that a plugin of this run comes from."""
    out = {"python": platform.python_version(), "uda": uda.__version__}
    for name in ("torch", "lightning", "torchmetrics", "pluggy"):
        out[name] = metadata.version(name)
    from uda.discovery import registry

    owners = {found.cls: found for found in registry().plugins.values()}
    for plugin in getattr(model, "plugins", {}).values():
        if (found := owners.get(type(plugin))) is not None:
            out[found.distribution] = found.version
    return out


def plugins_of(model: Any) -> dict[str, Any]:
    """Plugins as in a config."""
    out = {}
    for key, plugin in getattr(model, "plugins", {}).items():
        try:
            out[key] = describe(plugin)
        except TypeError:
            out[key] = {"class_path": f"{type(plugin).__module__}.{type(plugin).__qualname__}"}
    return out


def device_of(trainer: L.Trainer) -> dict[str, Any]:
    """Accelerator, number of processes, and peak memory in MiB: of the device, or of the process on a CPU."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name, peak = torch.cuda.get_device_name(device), torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            2**20 if sys.platform == "darwin" else 2**10
        )
        name = device.type
    return {"device": name, "world_size": trainer.world_size, "peak_memory_mib": round(peak, 1)}


class RunSummary(L.Callback):
    """Keeps the figures of each validation, and at the end of a fit prints them and writes ``summary.json``.

    Each validation also writes ``history.jsonl``: the figures, and the mean of each objective over the steps that
    were logged since the last validation (every ``trainer.log_every_n_steps``; no logger is needed). The history
    is part of the checkpoints, so that a resumed run has all of it. Target accuracies are there for the report
    only: the epoch called *selected* is the one with the best label-free score.

    Args:
        dirpath: where ``summary.json`` goes; None: the trainer's ``default_root_dir``.
        select_by: label-free score, one of ``uda.selection.SCORES``, or ``vote``.
        config: the run's config, for ``config_hash``.
        show: print the table.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        select_by: str = DEFAULT_SCORE,
        config: Mapping[str, Any] | None = None,
        show: bool = True,
    ) -> None:
        needed_scores(select_by)  # refuses what is no score
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.select_by, self.show = select_by, show
        self.config_hash = None if config is None else config_hash(config)
        self.history: list[dict[str, Any]] = []
        self._means = ObjectiveMeans()
        self.summary: dict[str, Any] = {}
        self._before = 0.0
        self._since: float | None = None

    def folder(self, trainer: L.Trainer) -> Path:
        """Where the files go."""
        return self.dirpath or Path(trainer.default_root_dir)

    # ------------------------------------------------------------------------------------ over the run

    @property
    def seconds(self) -> float:
        """Training time, that of interrupted parts included."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    def state_dict(self) -> dict[str, Any]:
        """History, the objectives since its last row, and seconds."""
        return {"history": self.history, "means": self._means.state(), "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history, self._before = list(state_dict["history"]), float(state_dict["seconds"])
        if "means" in state_dict:
            self._means.load(state_dict["means"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._since = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Take note of the objectives, in steps that are logged."""
        if (logged := getattr(pl_module, "logged", None)) is not None:
            self._means.add(logged)
            pl_module.logged = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take note of the figures."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **figures_of(trainer), **self._means.take()}
        if self.history and self.history[-1]["step"] == row["step"]:
            self.history.pop()  # a run resumed inside its validation repeats it
        self.history.append(row)
        if self.select_by == "vote":  # which only a history can hold; checkpoints are written after this
            value = monitor_value(self.history, "vote")
            trainer.callback_metrics["guarded/vote"] = torch.tensor(value)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_history(self.folder(trainer), self.history)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        self.summary = self.make(trainer, pl_module)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        folder = self.folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / ".summary.json"
        partial.write_text(json.dumps(self.summary, indent=2) + "\n")
        partial.replace(folder / "summary.json")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print, now that no progress bar is drawn any more."""
        if self.show and self.summary and trainer.is_global_zero and not trainer.fast_dev_run:
            print_table(self.summary)
            self.show = False

    # ------------------------------------------------------------------------------------- the summary

    def best(self, key: str) -> dict[str, Any] | None:
        """First validation with the largest figure ``key``."""
        rows = [r for r in self.history if math.isfinite(r.get(key, math.nan))]
        return max(rows, key=lambda r: r[key], default=None)

    def scores(self) -> dict[str, dict[str, Any]]:
        """Each label-free score: its last value, and the target accuracy of the epoch it would take alone."""
        names = [k for k in (self.history[-1] if self.history else {}) if k.startswith("select/")]
        out = {}
        for name in (k.removeprefix("select/") for k in names if k != "select/collapsed"):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = select_epoch(self.history, name)
            taken = {} if chosen is None else self.history[chosen]
            out[name] = {
                "last": rounded(self.history[-1][f"select/{name}"]),
                "target_accuracy": rounded(taken.get(oracle("target_accuracy"))),
            }
        return out

    def make(self, trainer: L.Trainer, model: L.LightningModule) -> dict[str, Any]:
        """The summary as plain data; measures are fractions of 1, and None where there are no labels."""
        last = self.history[-1] if self.history else {}
        score = f"select/{self.select_by}"
        choose = running_choice if self.select_by == "vote" else select_epoch  # the one that was kept
        chosen = choose(self.history, self.select_by)  # none that has collapsed
        selected = None if chosen is None else self.history[chosen]
        measures = {}
        for name in measures_of(*self.history):
            rows = {"last": last, "selected": selected or {}, "oracle": self.best(oracle(name)) or {}}
            measures[name] = {which: rounded(row.get(oracle(name))) for which, row in rows.items()}
        selection: dict[str, Any] = {"score": self.select_by, "epoch": None, "step": None, "value": None}
        if selected is not None:
            selection |= {
                "epoch": selected["epoch"],
                "step": selected["step"],
                "value": rounded(selected.get(score)),
            }
        datamodule = getattr(trainer, "datamodule", None)
        bad = getattr(datamodule, "bad_images", None)
        return {
            **{k: rounded(last.get(k)) for k in SOURCE_FIGURES if k == "source_accuracy" or k in last},
            **measures,
            "selection": selection,
            "scores": self.scores(),
            "seconds": round(self.seconds, 3),
            "steps": trainer.global_step,
            "last_validation_step": last.get("step"),
            "epochs": trainer.current_epoch,
            "seed": getattr(model, "base_seed", None),
            "source": list(getattr(model, "source_names", []) or []),
            "target": getattr(model, "target_name", None),
            **setting_of(datamodule),
            "plugins": plugins_of(model),
            "config_hash": self.config_hash,
            "versions": versions(model),
            **device_of(trainer),
            "bad_images": dict(bad) if isinstance(bad, Mapping) else None,
        }
