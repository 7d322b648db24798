"""The command ``uda``: looks at the first word, and imports only what that command needs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import NamedTuple

import uda
from uda.commands import installed
from uda.errors import UDAError


class Command(NamedTuple):
    """Where a command lives. Its module has ``main(argv)``, with the command's own name as ``argv[0]``."""

    module: str
    summary: str


#: A new command of the core is one entry here; distributions bring theirs as entry points (docs/write_a_plugin.md).
COMMANDS: dict[str, Command] = {
    "fit": Command("uda.lightning_cli", "train from a config, in a run directory of its own"),
    "validate": Command("uda.lightning_cli", "accuracy and label-free scores of a checkpoint"),
    "test": Command("uda.lightning_cli", "the same on the test split; test-time adaptation where a plugin adapts"),
    "predict": Command("uda.lightning_cli", "labels for the target images, as predictions.csv"),
    "plugins": Command("uda.commands.plugins", "list methods; `show NAME`, `new NAME`"),
    "data": Command("uda.commands.data", "list benchmarks; `show NAME`, `check NAME ROOT`, `download NAME ROOT`"),
    "bench": Command("uda.commands.bench", "suites of methods x tasks x seeds; tables; tuning without labels"),
    "inspect": Command("uda.commands.inspect", "the shift before training: what kind, how large, whether to adapt"),
    "report": Command("uda.commands.report", "one HTML page on one or several finished runs"),
}


def usage() -> str:
    """The text of ``uda --help``."""
    every = {**COMMANDS, **installed.installed(COMMANDS)}
    width = max(map(len, every))
    rows = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in every.items())
    return (
        f"uda {uda.__version__}: unsupervised domain adaptation on PyTorch Lightning\n\n"
        f"usage: uda COMMAND [options]\n\n{rows}\n\n"
        "`uda COMMAND --help` lists a command's options; `uda fit --print_config --config FILE` shows all "
        "settings.\n"
        "UDA_DEBUG=1 shows the traceback behind an error message."
    )


def user_error(error: BaseException | None) -> Exception | None:
    """The :class:`UDAError` in a chain of exceptions, or Lightning's own error for bad settings."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, UDAError) or type(error).__name__ == "MisconfigurationException":
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def report(error: Exception) -> None:
    """Print an error as one block on stderr, with the rank where there are several."""
    rank = next((os.environ[k] for k in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if k in os.environ), "0")
    where = f" (rank {rank})" if rank != "0" else ""
    sys.stdout.flush()
    print(f"\nuda: error{where}: {error}", file=sys.stderr, flush=True)


def run(argv: list[str]) -> int:
    """The help, the version, or a command by its name; its exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        print(f"uda {uda.__version__}")
        return 0
    built_in = importlib.import_module(COMMANDS[argv[0]].module).main if argv[0] in COMMANDS else None
    return (built_in or installed.find(argv[0], COMMANDS))(argv) or 0


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 2 on bad input, 130 after Ctrl-C; other exceptions pass, with traceback and exit code 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        code = run(argv)
        sys.stdout.flush()  # here, where a closed pipe can still be handled
        return code
    except KeyboardInterrupt:
        print("uda: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `uda plugins | head`: the reader has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        told = user_error(error)
        if told is None or os.environ.get("UDA_DEBUG") == "1":
            raise
        report(told)
        return 2


if __name__ == "__main__":
    sys.exit(main())
