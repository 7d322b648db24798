"""A suite: methods x tasks x seeds, each run a normal config plus overrides."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from uda.bench.merge import content_hash, expanded, merged, with_overrides
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.errors import UDAError, nearest

_KEYS = (
    "name", "description", "runs_dir", "ledger", "base", "overrides", "tasks", "methods", "seeds",
    "select_by", "threads", "slurm",
)  # fmt: skip
_METHOD_KEYS = ("config", "plugins", "overrides")


@dataclass(frozen=True)
class Run:
    """One run of a suite.

    Attributes:
        config: complete, as written: variables are not expanded, so that its hash is the same on every
            machine.
        key: hash of ``config``, seed and selection rule. A run is finished when the ledger has its key.
    """

    suite: str
    task: str
    method: str
    seed: int
    select_by: str
    config: dict[str, Any] = field(hash=False)
    runs_dir: Path = field(hash=False)
    threads: int = field(default=0, hash=False)

    @property
    def key(self) -> str:
        """12 hex digits."""
        return content_hash({**self.config, "seed_everything": self.seed, "select_by": self.select_by})

    @property
    def label(self) -> str:
        """``task/method/seed``: what ``--only`` matches."""
        return f"{self.task}/{self.method}/{self.seed}"

    @property
    def folder(self) -> Path:
        """The run's directory: another config is another directory."""
        return self.runs_dir / _safe(self.task) / _safe(self.method) / f"seed{self.seed}-{self.key}"

    def expanded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The config to run, and which strings came from variables."""
        used: dict[str, str] = {}
        return expanded(self.config, used), used


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
                str(k): dict(_mapping(v or {}, f"{path}: task {str(k)!r}"))
                for k, v in _mapping(spec.get("tasks"), f"{path}: tasks").items()
            },
            methods=_methods(spec.get("methods"), path),
            seeds=_seeds(given.get("seeds", spec.get("seeds", [0])), path),
            runs_dir=runs_dir,
            ledger=Path(given.get("ledger") or spec.get("ledger") or runs_dir / "ledger.jsonl"),
            base=read_yaml(path.parent / spec["base"]) if spec.get("base") else {},
            overrides=dict(_mapping(spec.get("overrides") or {}, f"{path}: overrides")),
            forced=dict(overrides or {}),
            select_by=str(spec.get("select_by", DEFAULT_SCORE)),
            threads=_whole(spec.get("threads", 0), f"{path}: threads"),
            slurm=dict(_mapping(spec.get("slurm") or {}, f"{path}: slurm")),
            description=str(spec.get("description", "")),
        )
        if not (suite.tasks and suite.methods and suite.seeds):
            raise UDAError(f"{path}: a suite needs at least one task, one method and one seed.")
        return suite

    def config(self, task: str, method: str) -> dict[str, Any]:
        """Config of a run.

        In this order: base, the method's config and plugins, overrides of the suite, of the method, of the
        task, and of the command line.
        """
        spec = self.methods[method]
        config = merged(self.base, spec.get("config") or {})
        if "plugins" in spec:  # given in the suite: they are all there are, not laid over those of the base
            config = merged(config, {"model": {}})
            config["model"]["plugins"] = spec["plugins"]
        for overrides in (self.overrides, spec.get("overrides") or {}, self.tasks[task], self.forced):
            config = with_overrides(config, overrides)
        config.pop("seed_everything", None)
        return config

    def runs(self, only: str | None = None) -> list[Run]:
        """All runs, seeds outermost, so that a suite that is cut short has whole rows.

        Args:
            only: shell pattern of ``task/method/seed``; a part of the label is enough where it has no
                ``*?[``.

        Raises:
            UDAError: the pattern fits none.
        """
        out = []
        for seed in self.seeds:
            for task in self.tasks:
                for method in self.methods:
                    config = self.config(task, method)
                    out.append(Run(self.name, task, method, seed, self.select_by, config, self.runs_dir, self.threads))
        if only is None:
            return out
        pattern = only if set("*?[") & set(only) else f"*{only}*"
        kept = [r for r in out if fnmatch.fnmatch(r.label, pattern)]
        if not kept:
            raise UDAError(f"--only {only!r} fits no run. {nearest(only, (r.label for r in out))}")
        return kept


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        UDAError: no such file, no YAML, or no mapping.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UDAError(f"no file {str(path)!r}. {nearest(path.name, near)}")
    try:
        data = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UDAError(f"{path} is no YAML: {error}") from error
    if not isinstance(data, dict):
        raise UDAError(f"{path} must hold a mapping of settings.")
    return data


def _whole(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UDAError(f"{where}: a whole number is needed, not {value!r}.")
    return value


def _seeds(seeds: Any, path: Path) -> list[int]:
    if not isinstance(seeds, list | tuple):
        raise UDAError(f"{path}: seeds is a list of whole numbers such as [0, 1, 2], not {seeds!r}.")
    return [_whole(seed, f"{path}: seeds") for seed in seeds]


def check_keys(spec: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    """Raise a :class:`~uda.errors.UDAError` on a key that is none of ``known``."""
    for key in spec:
        if key not in known:
            raise UDAError(f"{where}: unknown key {key!r}. {nearest(str(key), known)}")


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UDAError(f"{where} must be a mapping of names, not {value!r}.")
    return value


def _methods(value: Any, path: Path) -> dict[str, dict[str, Any]]:
    """Methods by name: a mapping, the name of a file that holds one and serves several suites, or a list of these."""
    if isinstance(value, list):
        return {name: spec for part in value for name, spec in _methods(part, path).items()}
    if isinstance(value, str):
        path = path.parent / value
        return _methods(read_yaml(path), path)
    return {
        str(k): _method(v, f"{path}: methods.{k}", path.parent)
        for k, v in _mapping(value, f"{path}: methods").items()
    }


def _method(value: Any, where: str, folder: Path) -> dict[str, Any]:
    """A method: ``{config, plugins, overrides}``, or a config's file name alone; several are laid one over another."""
    spec = {"config": value} if isinstance(value, str | list) else dict(_mapping(value or {}, where))
    check_keys(spec, _METHOD_KEYS, where)
    if isinstance(spec.get("config"), str | list):
        names = [spec["config"]] if isinstance(spec["config"], str) else spec["config"]
        spec["config"] = {}
        for name in names:
            spec["config"] = merged(spec["config"], read_yaml(folder / str(name)))
    _mapping(spec.get("overrides") or {}, f"{where}.overrides")
    if "plugins" in spec:
        spec["plugins"] = dict(_mapping(spec["plugins"] or {}, f"{where}.plugins"))
    return spec


def _safe(name: str) -> str:
    """A folder's name: letters, digits, ``-_.+``; an arrow becomes ``-``."""
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in name.replace("->", "-").replace("→", "-"))
