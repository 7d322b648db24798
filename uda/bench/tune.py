"""Tuning by a label-free score: Optuna over the search space that a plugin declares.

What a trial hands to the search is one number, made of label-free scores alone; the oracle's figures are
read from disk for the report, when the search is over.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uda.bench import chain
from uda.bench.launch import Launch, forked
from uda.bench.ledger import Ledger
from uda.bench.merge import with_overrides
from uda.bench.record import read_summary
from uda.bench.runner import run_all
from uda.bench.spec import read_yaml
from uda.bench.suite import Run, Suite
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError, nearest


def suggest(trial: Any, name: str, space: Any) -> Any:
    """A value from an entry of ``search_space``: ``(low, high)``, ``(low, high, "log")`` or choices.

    Two whole numbers as limits give whole numbers.
    """
    if isinstance(space, list):
        return trial.suggest_categorical(name, space)
    low, high, *rest = space
    log = bool(rest) and rest[0] == "log"
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(name, low, high, log=log)
    return trial.suggest_float(name, float(low), float(high), log=log)


def label_free(summary: dict[str, Any], score: str) -> float:
    """The score of the epoch that it selects, from the parts of a summary that no target label had a part in.

    Minus infinity where the score has selected nothing: all validations had collapsed.
    """
    selection = summary["selection"]
    if selection["score"] != score:
        raise UDAError(f"the run was selected by {selection['score']!r}, not by {score!r}.")
    value = selection["value"]
    return -math.inf if value is None or not math.isfinite(value) else float(value)


class Study:
    """A search for the settings of one plugin.

    Args:
        name: of the study, part of its folder's name.
        runs: one for each task and seed, with the settings to start from.
        plugin: key in ``model.plugins``.
        score: label-free score, larger is better; a trial's value is the mean over ``runs``.
        folder: of the study: its trials, runs and ledger.
        launch: how a run is started.
    """

    def __init__(
        self, name: str, runs: list[Run], plugin: str, score: str, folder: Path, launch: Launch = forked
    ) -> None:
        self.name, self.runs, self.plugin, self.score = name, runs, plugin, score
        self.folder, self.launch = folder, launch
        self.class_path, self.space = self._search_space()
        self.ledger = Ledger(folder / "ledger.jsonl")
        self.study: Any = None

    @classmethod
    def of(
        cls,
        source: Path,
        plugin: str,
        score: str = DEFAULT_SCORE,
        method: str | None = None,
        tasks: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        overrides: dict[str, Any] | None = None,
        runs_dir: Path | None = None,
        launch: Launch = forked,
    ) -> Study:
        """A study over a suite's method, or over a config of ``uda fit``.

        Raises:
            UDAError: no such plugin, method, task or score.
        """
        from uda.selection import SCORES

        if score not in SCORES:
            raise UDAError(f"--score: unknown label-free score {score!r}. {nearest(score, SCORES)}")
        seeds, spec = list(seeds or [0]), read_yaml(source)
        folder = (runs_dir or Path("runs", "tune")) / f"{source.stem}-{method or 'config'}-{plugin}-{score}"
        if "methods" in spec:
            suite = Suite.load(source, overrides, seeds=seeds)
            method = method or _only_method(suite, plugin)
            for name, known, what in [
                (method, suite.methods, "method"),
                *((t, suite.tasks, "task") for t in tasks or ()),
            ]:
                if name not in known:
                    raise UDAError(f"{source} has no {what} {name!r}. {nearest(name, known)}")
            folder = folder.with_name(f"{suite.name}-{method}-{plugin}-{score}")
            runs = [r for r in suite.runs() if r.method == method and (not tasks or r.task in tasks)]
        else:
            if method or tasks:
                raise UDAError("--method and --tasks are for suites; a config has one of each.")
            config = with_overrides(spec, overrides or {})
            config.pop("seed_everything", None)
            runs = [Run("tune", "config", source.stem, seed, score, config, folder) for seed in seeds]
        runs = [chain.replaced(r, select_by=score, runs_dir=folder / "runs") for r in runs]
        return cls(folder.name, runs, plugin, score, folder, launch)

    def _search_space(self) -> tuple[str, dict[str, Any]]:
        from uda.discovery import registry

        plugins = (self.runs[0].config.get("model") or {}).get("plugins") or {}
        if self.plugin not in plugins:
            raise UDAError(f"--plugin: the config has no plugin {self.plugin!r}. {nearest(self.plugin, plugins)}")
        spec = plugins[self.plugin]
        class_path = spec if isinstance(spec, str) else spec["class_path"]
        space = dict(registry().get(class_path).search_space)
        if not space:
            raise UDAError(f"{class_path} declares no search_space: there is nothing to tune.")
        return class_path, space

    # ---------------------------------------------------------------------------------------- the search

    def value(self, settings: dict[str, Any], workers: int = 1, gpus: Sequence[str] = ()) -> float:
        """The score of the plugin with these settings, mean over tasks and seeds.

        Raises:
            RuntimeError: a run failed.
        """
        runs = self.with_settings(settings)
        run_all(runs, self.ledger, workers, self.launch, gpus, tell_target=False)
        values = []
        for run in runs:
            summary = read_summary(run.folder)
            if summary is None:
                raise RuntimeError(f"{run.label} failed: log in {run.folder}.log")
            values.append(label_free(summary, self.score))
        return sum(values) / len(values)

    def with_settings(self, settings: dict[str, Any]) -> list[Run]:
        """The runs of a trial."""
        prefix = f"model.plugins.{self.plugin}"
        changes = {
            f"{prefix}.class_path": self.class_path,
            **{f"{prefix}.{k}": v for k, v in settings.items()},
        }
        return [
            dataclasses.replace(r, config=with_overrides(_spelt(r.config, self.plugin), changes)) for r in self.runs
        ]

    def run(self, trials: int, workers: int = 1, gpus: Sequence[str] = ()) -> None:
        """Search until there are ``trials`` in all; a study that was stopped goes on.

        Raises:
            UDAError: Optuna is not installed.
        """
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            raise UDAError("`uda bench tune` needs the package optuna: pip install uda-lightning[tune]") from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(self.folder / "study.log"))), study_name=self.name,
            direction="maximize", load_if_exists=True,
            sampler=optuna.samplers.TPESampler(
                seed=len(self._trials()), n_startup_trials=max(5, trials // 4)
            ),
        )  # fmt: skip
        done = sum(t.state.is_finished() for t in self.study.trials)

        def objective(trial: Any) -> float:
            settings = {name: suggest(trial, name, space) for name, space in self.space.items()}
            value = self.value(settings, workers, gpus)
            with (self.folder / "trials.jsonl").open("a") as out:
                out.write(json.dumps({"trial": trial.number, "settings": settings, self.score: value}) + "\n")
            print(f"trial {trial.number}: {self.score} {value:.4f}  {settings}", flush=True)
            return value if math.isfinite(value) else -1e9  # a collapse is bad, and no reason to stop

        if trials > done:
            self.study.optimize(objective, n_trials=trials - done, catch=(RuntimeError,))

    def _trials(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.folder / "trials.jsonl").read_text().splitlines()]
        except FileNotFoundError:
            return []

    # ---------------------------------------------------------------------------------------- the report

    def report(self) -> str:
        """The trials by score, with target accuracy beside them; and the best settings as YAML overrides."""
        trials = sorted(self._trials(), key=lambda t: -t[self.score])
        if not trials:
            return "no trial has finished"
        lines = [f"{'trial':>5}  {self.score:>9}  {'target %':>8}  settings   (target: for the report only)"]
        for t in trials[:10]:
            accuracy = self._oracle(t["settings"])
            told = "-" if accuracy is None else f"{100 * accuracy:.1f}"
            lines.append(f"{t['trial']:>5}  {t[self.score]:>9.4f}  {told:>8}  {t['settings']}")
        best = trials[0]["settings"]
        lines += ["", f"best of {len(trials)} by {self.score}:"]
        lines += [f"  --model.plugins.{self.plugin}.{name}={value}" for name, value in best.items()]
        return "\n".join(lines)

    def _oracle(self, settings: dict[str, Any]) -> float | None:
        """Mean target accuracy of a trial's selected epochs."""
        summaries = [read_summary(r.folder) or {} for r in self.with_settings(settings)]
        values = [(s.get("target_accuracy") or {}).get("selected") for s in summaries]
        return None if None in values else sum(values) / len(values)


def _spelt(config: dict[str, Any], plugin: str) -> dict[str, Any]:
    """A config whose plugin is given in the long form."""
    spec = config["model"]["plugins"][plugin]
    return (
        with_overrides(config, {f"model.plugins.{plugin}": {"class_path": spec}}) if isinstance(spec, str) else config
    )


def _only_method(suite: Suite, plugin: str) -> str:
    task = next(iter(suite.tasks))
    found = [m for m in suite.methods if plugin in (suite.config(task, m).get("model", {}).get("plugins") or {})]
    if len(found) != 1:
        have = f"these have: {', '.join(found)}" if found else "none has"
        raise UDAError(f"--method: name one method of the suite that has the plugin {plugin!r} ({have}).")
    return found[0]
