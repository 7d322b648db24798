"""A suite: methods x tasks x seeds, each run a normal config plus overrides."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uda.bench import chain
from uda.bench.merge import content_hash, copied, expanded, merged, with_overrides
from uda.bench.spec import check_keys, mapping, methods_of, read_yaml, seed_list, whole
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError, nearest

_KEYS = (
    "name", "description", "runs_dir", "ledger", "base", "overrides", "tasks", "methods", "seeds",
    "select_by", "threads", "slurm",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Attributes:
        config: complete, as written: variables are not expanded, so that its hash is the same on every
            machine.
        starts: what it takes from other runs, which are made before it (:mod:`uda.bench.chain`).
        key: hash of ``config``, seed and selection rule, and the keys of those that it starts from. A run is
            finished when the ledger has its key.
    """

    suite: str
    task: str
    method: str
    seed: int
    select_by: str
    config: dict[str, Any] = field(hash=False)
    runs_dir: Path = field(hash=False)
    threads: int = field(default=0, hash=False)
    starts: tuple[chain.Start, ...] = field(default=(), hash=False)

    @functools.cached_property
    def key(self) -> str:
        """12 hex digits."""
        starts = {"starts": {s.setting: s.identity() for s in self.starts}} if self.starts else {}
        return content_hash({**self.config, "seed_everything": self.seed, "select_by": self.select_by, **starts})

    @property
    def label(self) -> str:
        """``task/method/seed``: what ``--only`` matches."""
        return f"{self.task}/{self.method}/{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's directory: another config is another directory."""
        return self.runs_dir / _safe(self.task) / _safe(self.method) / f"seed{self.seed}-{self.key}"

    def expanded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The config to run, and which strings came from variables, or name checkpoints of other runs."""
        used: dict[str, str] = {}
        config = expanded(self.config, used)
        return with_overrides(config, {s.setting: s.value(used) for s in self.starts}), used


@dataclass
class Suite:
    """What a suite file says, checked."""

    name: str
    tasks: dict[str, dict[str, Any]]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    runs_dir: Path
    ledger: Path
    base: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    forced: dict[str, Any] = field(default_factory=dict)
    select_by: str = DEFAULT_SCORE
    threads: int = 0
    slurm: dict[str, Any] = field(default_factory=dict)
    description: str = ""
    order: list[str] = field(default_factory=list)  # of methods in time

    @classmethod
    def load(cls, path: str | Path, overrides: Mapping[str, Any] | None = None, **given: Any) -> Suite:
        """Read a suite file.

        Args:
            path: of the YAML file; configs that it names are relative to it.
            overrides: dotted keys for all runs, above everything in the file.
            given: ``runs_dir``, ``ledger`` and ``seeds`` that replace the file's, unless None.

        Raises:
            UDAError: unknown keys, nothing to run, or a config that cannot be read.
        """
        path = Path(path)
        spec = read_yaml(path)
        check_keys(spec, _KEYS, str(path))
        given = {k: v for k, v in given.items() if v is not None}
        name = str(spec.get("name") or path.stem)
        runs_dir = Path(given.get("runs_dir") or spec.get("runs_dir") or Path("runs", "bench", name))
        suite = cls(
            name=name,
            tasks={
                str(k): dict(mapping(v or {}, f"{path}: task {str(k)!r}"))
                for k, v in mapping(spec.get("tasks"), f"{path}: tasks").items()
            },
            methods=methods_of(spec.get("methods"), path),
            seeds=seed_list(given.get("seeds", spec.get("seeds", [0])), path),
            runs_dir=runs_dir,
            ledger=Path(given.get("ledger") or spec.get("ledger") or runs_dir / "ledger.jsonl"),
            base=read_yaml(path.parent / spec["base"]) if spec.get("base") else {},
            overrides=dict(mapping(spec.get("overrides") or {}, f"{path}: overrides")),
            forced=dict(overrides or {}),
            select_by=str(spec.get("select_by", DEFAULT_SCORE)),
            threads=whole(spec.get("threads", 0), f"{path}: threads"),
            slurm=dict(mapping(spec.get("slurm") or {}, f"{path}: slurm")),
            description=str(spec.get("description", "")),
        )
        if not (suite.tasks and suite.methods and suite.seeds):
            raise UDAError(f"{path}: a suite needs at least one task, one method and one seed.")
        suite.order = chain.in_order(suite.methods, str(path))
        return suite

    def config(self, task: str, method: str) -> dict[str, Any]:
        """Config of a run.

        In this order: base, the method's config and plugins, overrides of the suite, of the method, of the
        task, and of the command line; the method's ``source`` picks from those of the task. A method that others
        start from writes checkpoints.

        Raises:
            UDAError: the task has no such source.
        """
        spec = self.methods[method]
        config = merged(self.base, spec.get("config") or {})
        if "plugins" in spec:  # given in the suite: they are all there are, not laid over those of the base
            config = merged(config, {"model": {}})
            config["model"]["plugins"] = spec["plugins"]
        for overrides in (self.overrides, spec.get("overrides") or {}, self.tasks[task]):
            config = with_overrides(config, overrides)
        if "source" in spec:
            config = with_overrides(config, {"data.source": _picked(config, spec["source"], f"{task}/{method}")})
        config = with_overrides(config, self.forced)
        config.pop("seed_everything", None)
        trainer = config.get("trainer") or {}
        if trainer.get("enable_checkpointing") is False and any(method in self._firsts(m) for m in self.methods):
            trainer["enable_checkpointing"] = True
        return config

    def _firsts(self, method: str) -> list[str]:
        """Methods that this one starts from."""
        return [n for v in chain.settings_of(self.methods[method], method).values() for n in chain.listed(v)]

    def run(self, task: str, method: str, seed: int, configs: dict[tuple[str, str], Any] | None = None) -> Run:
        """One run, with those that it starts from; ``configs`` keeps what other seeds have as well."""
        spec, configs = self.methods[method], {} if configs is None else configs
        starts = tuple(
            chain.Start(
                setting, tuple(self.run(task, name, seed, configs) for name in chain.listed(names)),
                spec.get("checkpoint", "last"), isinstance(names, list),
            )
            for setting, names in chain.settings_of(spec, method).items()
        )  # fmt: skip
        if (task, method) not in configs:
            configs[task, method] = self.config(task, method)
        config = copied(configs[task, method])
        return Run(self.name, task, method, seed, self.select_by, config, self.runs_dir, self.threads, starts)

    def runs(self, only: str | None = None) -> list[Run]:
        """All runs, seeds outermost, so that a suite that is cut short has whole rows; each after those it starts from.

        Args:
            only: shell pattern of ``task/method/seed``; a part of the label is enough where it has no
                ``*?[``. Runs that these start from come with them.

        Raises:
            UDAError: the pattern fits none.
        """
        order = self.order or list(self.methods)
        configs: dict[tuple[str, str], Any] = {}
        out = [self.run(task, method, seed, configs) for seed in self.seeds for task in self.tasks for method in order]
        if only is None:
            return out
        pattern = only if set("*?[") & set(only) else f"*{only}*"
        kept = [r for r in out if fnmatch.fnmatch(r.label, pattern)]
        if not kept:
            raise UDAError(f"--only {only!r} fits no run. {nearest(only, (r.label for r in out))}")
        return chain.with_firsts(kept)


def check_distinct(runs: Iterable[Run]) -> None:
    """Refuse a suite in which one run has two names: only one of them would ever appear in a table.

    Raises:
        UDAError: with both names.
    """
    seen: dict[str, str] = {}
    for run in runs:
        if run.key in seen:
            raise UDAError(f"{seen[run.key]} and {run.label} are the same run (equal config and seed): take one out.")
        seen[run.key] = run.label


def _picked(config: Mapping[str, Any], source: int | None, where: str) -> Any:
    """The task's source of this number; None: none."""
    given = (config.get("data") or {}).get("source")
    names = given if isinstance(given, list) else [] if given is None else [given]
    if source is not None and source >= len(names):
        raise UDAError(f"{where}: source {source} of the task is asked for, and it has {len(names)} (counted from 0).")
    return None if source is None else names[source]


def _safe(name: str) -> str:
    """A folder's name: letters, digits, ``-_.+``; an arrow becomes ``-``."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name.replace("->", "-").replace("→", "-"))
