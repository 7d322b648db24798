"""The directory of a run: which one it is, and who may write into it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uda.errors import UDAError, check_writable

RECORD = "run.json"
#: hands the directory that rank 0 chose to the processes that Lightning starts from it
_HANDED_DOWN = "UDA_RUN_DIR"
_WAIT = 120.0  # seconds that a rank waits for rank 0 to choose a directory


def job_id() -> str | None:
    """The SLURM job of this process; the same again after a requeue."""
    return os.environ.get("SLURM_JOB_ID")


def is_first_rank() -> bool:
    """Whether this process decides, before any process group exists."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    return rank == "0" and os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")) == "0"


def _launch() -> str:
    """What processes that were started together by an outside launcher have in common."""
    keys = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "MASTER_PORT")
    return "/".join(os.environ.get(k, "") for k in keys)


def read_record(folder: Path) -> dict[str, Any]:
    """``run.json`` of a directory; empty where there is none."""
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def is_used(folder: Path) -> bool:
    """Whether a directory exists with something in it."""
    return folder.is_dir() and any(folder.iterdir())


def run_of_checkpoint(path: str | Path) -> Path:
    """The run directory of a checkpoint: the nearest folder above it with a ``run.json``, else its own."""
    file = Path(path).absolute()
    for folder in (file.parent, file.parent.parent):
        if (folder / RECORD).is_file() or (folder / "config.yaml").is_file():
            return folder
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest state of a run: ``checkpoints/last.ckpt``, or what a SLURM requeue left."""
    found = [folder / "checkpoints" / "last.ckpt", *folder.glob("hpc_ckpt_*.ckpt")]
    found = [f for f in found if f.is_file()]
    return max(found, key=lambda f: f.stat().st_mtime_ns, default=None)


def default_base(configs: list[str], seed: Any) -> Path:
    """``runs/<config stem>/seed<seed>``; a run's own ``config.yaml`` counts under the name of that run."""
    stems = []
    for config in configs:
        path = Path(config).absolute()
        if path.name == "config.yaml" and (path.parent / RECORD).is_file():
            numbered = path.parent.name.startswith("seed")
            stems.append(path.parent.parent.name if numbered else path.parent.name)
        else:
            stems.append(path.stem)
    return Path("runs", "_".join(stems) or "run", f"seed{seed}")


@dataclass
class RunDirectory:
    """A chosen directory, and the checkpoint to go on from.

    Args:
        path: of the run.
        resume: checkpoint to resume from, or None.
        fresh: whether this process made the directory.
    """

    path: Path
    resume: Path | None = None
    fresh: bool = False

    @classmethod
    def for_fit(
        cls, run_dir: str | None, ckpt_path: str | None, configs: list[str], seed: Any
    ) -> RunDirectory:
        """Where a fit writes.

        Raises:
            UDAError: the directory is used by another run, or the checkpoint does not exist.
        """
        if ckpt_path not in (None, "last"):
            check_exists(ckpt_path)
        if run_dir is None and ckpt_path == "last":
            raise UDAError("--ckpt_path last needs --run_dir: the directory of the run to resume.")
        if run_dir is None and ckpt_path is not None:
            run_dir = str(run_of_checkpoint(ckpt_path))
        if run_dir is None:
            return cls._numbered(default_base(configs, seed))
        folder = Path(run_dir).expanduser()
        requeued = job_id() is not None and read_record(folder).get("job_id") == job_id()
        if ckpt_path == "last" or (ckpt_path is None and requeued):
            resume = newest_checkpoint(folder)
            if resume is None and is_used(folder) and not (folder / RECORD).is_file():
                raise UDAError(
                    f"--ckpt_path last: {str(folder)!r} is no run directory (no {RECORD}, no checkpoints)."
                )
            return cls(folder, resume, not folder.exists())
        if ckpt_path is not None:
            if (
                is_first_rank()
                and is_used(folder)
                and folder.absolute() not in Path(ckpt_path).absolute().parents
            ):
                raise UDAError(
                    f"--run_dir {run_dir}: it holds another run than the checkpoint {ckpt_path!r}. Leave "
                    "--run_dir out to continue that checkpoint's run, or name a new directory."
                )
            return cls(folder, Path(ckpt_path), not folder.exists())
        if is_first_rank() and is_used(folder):
            raise UDAError(
                f"--run_dir {run_dir}: the directory exists and is not empty. Name a new one, leave "
                f"--run_dir out for a numbered one, or resume that run: --run_dir {run_dir} --ckpt_path last"
            )
        return cls(folder, None, not folder.exists())

    @classmethod
    def for_evaluation(
        cls, run_dir: str | None, ckpt_path: str | None, configs: list[str], seed: Any
    ) -> RunDirectory:
        """Where validate, test and predict write: beside the checkpoint's run, unless a directory is named.

        Raises:
            UDAError: no such checkpoint.
        """
        if ckpt_path == "last":
            resume = None if run_dir is None else newest_checkpoint(Path(run_dir).expanduser())
            if resume is None:
                raise UDAError(
                    "--ckpt_path last needs --run_dir: the directory of a run that has checkpoints."
                )
        else:
            resume = None if ckpt_path is None else check_exists(ckpt_path)
        if run_dir is not None:
            return cls(Path(run_dir).expanduser(), resume)
        if resume is not None:
            return cls(run_of_checkpoint(resume), resume)
        return cls._numbered(default_base(configs, seed))

    @classmethod
    def _numbered(cls, base: Path) -> RunDirectory:
        if not is_first_rank():
            return cls(_wait_for_first_rank(base))
        check_writable("the run directory", base.parent)
        for number in range(1, 100_000):
            folder = base if number == 1 else base.with_name(f"{base.name}-{number}")
            if job_id() is not None and read_record(folder).get("job_id") == job_id():
                return cls(folder, newest_checkpoint(folder))
            try:  # making it is claiming it: two runs that start at once do not share one
                folder.mkdir(parents=True)
            except FileExistsError:
                if folder.is_dir() and not is_used(folder):
                    return cls(folder, None, True)
                continue
            if number > 1:
                print(f"{base} exists: this run is in {folder}", flush=True)
            return cls(folder, None, True)
        raise UDAError(f"No free run directory beside {base}.")

    def claim(self, argv: list[str]) -> None:
        """Write ``run.json``, and hand the directory down to processes that Lightning starts from here."""
        self.path = self.path.absolute()
        if not is_first_rank():
            return
        check_writable("--run_dir", self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        old = read_record(self.path)
        starts = [
            *old.get("starts", []),
            {"time": time.time(), "argv": argv, "job_id": job_id(), "resumed": self.resumed},
        ]
        record = {
            "argv": argv,
            "job_id": job_id(),
            "started": old.get("started", time.strftime("%Y-%m-%dT%H:%M:%S%z")),
            "launch": _launch(),
            "starts": starts,
        }
        partial = self.path / f".{RECORD}"
        partial.write_text(json.dumps(record, indent=2) + "\n")
        partial.replace(self.path / RECORD)
        os.environ[_HANDED_DOWN] = str(self.path)

    @property
    def resumed(self) -> str | None:
        """The checkpoint resumed from, as text."""
        return None if self.resume is None else str(self.resume)

    def abandon(self) -> None:
        """Remove the directory of a run that failed before its first step, if this process made it."""
        if self.fresh and is_first_rank() and self.path.is_dir() and not (self.path / "checkpoints").exists():
            shutil.rmtree(self.path)
            for folder in list(self.path.parents)[:2]:  # runs/<name> that was made for it
                if folder in (Path.cwd(), Path.home()) or any(folder.iterdir()):
                    break
                folder.rmdir()


def _wait_for_first_rank(base: Path) -> Path:
    """The directory that rank 0 of this launch took."""
    if _HANDED_DOWN in os.environ:
        return Path(os.environ[_HANDED_DOWN])
    began = time.time()
    while time.time() - began < _WAIT:
        for folder in [base, *base.parent.glob(f"{base.name}-*")]:
            record = read_record(folder)
            if record.get("launch") == _launch() and record["starts"][-1]["time"] > began - _WAIT:
                return folder
        time.sleep(0.2)
    raise UDAError(
        f"Rank 0 has named no run directory under {base.parent} for {_WAIT:.0f} s: give --run_dir."
    )


def check_exists(path: str) -> Path:
    """A checkpoint's path.

    Raises:
        UDAError: there is none, with those of that folder.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    names = sorted(p.name for p in file.parent.glob("*.ckpt")) if file.parent.is_dir() else []
    hint = (
        f"That folder has {', '.join(names)}."
        if names
        else "`last` with --run_dir takes the latest of a run."
    )
    raise UDAError(f"--ckpt_path: no file {path!r}. {hint}")


def numbered_file(folder: Path, name: str) -> Path:
    """``folder/name``, or ``name-2``, ``name-3``, ... where that exists: nothing is overwritten."""
    path, number = folder / name, 1
    while path.exists():
        number += 1
        path = (folder / name).with_name(f"{Path(name).stem}-{number}{Path(name).suffix}")
    if number > 1:
        print(f"{folder / name} exists: writing {path}", file=sys.stderr)
    return path
