"""``uda fit``, ``validate``, ``test`` and ``predict``: Lightning's command line around a run directory."""

from __future__ import annotations

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from uda import data
from uda.arguments import Arguments, instantiated, option
from uda.console import quiet, short_parser_error
from uda.defaults import SCORE as DEFAULT_SCORE
from uda.discovery import registry
from uda.errors import UDAError
from uda.module import UDA
from uda.run.directory import RunDirectory, check_exists, is_first_rank, run_of_checkpoint
from uda.run.logs import ForgetRepeated, PlainProgress, run_loggers
from uda.run.predictions import EvaluationWriter, PredictionWriter
from uda.run.saved_config import SaveConfig
from uda.run.signals import StopBetweenBatches
from uda.run.summary import RunSummary
from uda.selection import DEFAULT_SCORES, SCORES, needed_scores
from uda.subclasses import subclasses_listed_once


class UDACLI(LightningCLI):
    """One command of Lightning's, with checked names, a run directory, and its checkpoints and summary.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        argv: what follows it.
    """

    def __init__(self, command: str, argv: list[str]) -> None:
        self.command, self.argv = command, argv
        self.run: RunDirectory | None = None
        self.configs: list[str] = []
        super().__init__(
            UDA,
            data.DataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_kwargs={"exit_on_error": False, command: {"exit_on_error": False}},
            args=[command, *argv],
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that was asked for: making a parser takes a while."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Options of the run directory."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="Directory of the run.")
        if self.command == "fit":
            parser.add_argument(
                "--checkpoint_every", type=int, default=0, help="Write last.ckpt each N steps too."
            )
            parser.add_argument(
                "--select_by", type=str, default=DEFAULT_SCORE, help=f"Label-free score: {', '.join(SCORES)}, or vote."
            )
        if self.command == "predict":
            parser.add_argument(
                "--probabilities", type=bool, default=False, help="Write class probabilities too."
            )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if quiet := {"predict": "return_predictions", "test": "verbose", "validate": "verbose"}.get(
            subcommand
        ):
            parser.set_defaults({quiet: False})  # callbacks write files and print what matters
        return parser

    # ------------------------------------------------------------------------------------------ parsing

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check all names, then parse.

        Raises:
            UDAError: anything that is wrong with a config or an option.
        """
        checkpoint = option(self.argv, "ckpt_path")
        if checkpoint not in (None, "last", "null"):
            check_exists(checkpoint)
        argv = self._with_config_of_run(self.argv)
        with tempfile.TemporaryDirectory(prefix="uda-") as folder:
            sections = {"model": UDA, "data": data.DataModule, "trainer": L.Trainer}
            arguments = Arguments(self.command, sections, Path(folder))
            words = arguments.prepare(argv)
            self.configs = arguments.configs
            try:
                with subclasses_listed_once():
                    self.config = parser.parse_args([self.command, *words])
            except ArgumentError as error:
                raise UDAError(short_parser_error(str(error))) from error
        self._given = self.config[self.command]

    def _with_config_of_run(self, argv: list[str]) -> list[str]:
        """Take the run's own config where only a checkpoint or a run directory is named."""
        if option(argv, "config") or "-c" in argv or {"-h", "--help"} & set(argv):
            return argv
        checkpoint, run_dir = option(argv, "ckpt_path"), option(argv, "run_dir")
        if checkpoint and checkpoint != "last" and Path(checkpoint).is_file():
            folder = run_of_checkpoint(checkpoint)
        elif checkpoint == "last" and run_dir:
            folder = Path(run_dir)
        else:
            return argv
        config = folder / "config.yaml"
        return ["--config", str(config), *argv] if config.is_file() else argv

    def _parse_ckpt_path(self) -> None:
        """Nothing: a run's config holds the model's settings, and what is given here is not overruled."""

    # -------------------------------------------------------------------------------------- directories

    def before_instantiate_classes(self) -> None:
        """Choose the run directory, before anything is built."""
        given = self._given
        seed, checkpoint = given["seed_everything"], given["ckpt_path"]
        if self.command == "fit":
            model = self.config[self.command]["model"]
            needed = needed_scores(given["select_by"], bool(self.config[self.command]["data"]["source"]))
            computed = model["scores"] or list(DEFAULT_SCORES)
            if missing := [n for n in needed if n not in computed]:  # what selects has to be computed
                model["scores"] = [*computed, *missing]
            self.run = RunDirectory.for_fit(given["run_dir"], checkpoint, self.configs, seed)
        else:
            self.run = RunDirectory.for_evaluation(given["run_dir"], checkpoint, self.configs, seed)
        if self.run.resume is not None and self.command == "fit":
            print(f"resuming from {self.run.resume}", flush=True)
        elif checkpoint == "last" and self.command == "fit":
            print("--ckpt_path last: no checkpoint yet, starting from the beginning", flush=True)
        self.config[self.command]["ckpt_path"] = self.run.resumed

    def instantiate_classes(self) -> None:
        """Claim the directory and build everything."""
        if self.command == "fit" or self.run.fresh:
            self.run.claim(["uda", self.command, *self.argv])
        self.run.path = self.run.path.absolute()
        self.config_init = instantiated(self.parser, self.config)
        self.datamodule, self.model = (self._get(self.config_init, part) for part in ("data", "model"))
        if self.run.resumed and not self.datamodule.source_names:  # what the run began from may be gone by now
            self.model.init_from = self.run.resumed
        self.trainer = self.instantiate_trainer()

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """The trainer, writing into the run directory."""
        given = self._get(self.config_init, "trainer", default={})
        own = list(given.get("callbacks") or [])
        kwargs |= {"default_root_dir": str(self.run.path), "callbacks": [*own, *self._callbacks(given, own)]}
        if given.get("logger") in (None, True):
            kwargs["logger"] = run_loggers(self.run.path / "logs") if self.command == "fit" else False
        if given.get("enable_model_summary") is None:
            kwargs["enable_model_summary"] = self.command == "fit" and sys.stdout.isatty()
        if self.model.hooks.filled("adapt") and self.command in ("test", "predict"):
            kwargs["inference_mode"] = False  # adapting needs gradients
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, given: dict[str, Any], own: list[Callback]) -> list[Callback]:
        run, out = self.run.path, []
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in own):
            out.append(RichProgressBar() if sys.stdout.isatty() else PlainProgress())
        if self.command == "predict":
            return [*out, PredictionWriter(run, self._given["probabilities"])]
        if self.command != "fit":
            return [*out, EvaluationWriter(run, self.run.resumed)]
        config = self.plain_config()
        out += [
            RunSummary(run, self._given["select_by"], config),
            ForgetRepeated(),
            SaveConfig(run, config, self.run.resume is not None),
        ]
        if given.get("enable_checkpointing") is False:
            return out
        return [
            *out,
            StopBetweenBatches(run / "checkpoints" / "last.ckpt"),
            *self._checkpoints(run / "checkpoints"),
        ]

    def _checkpoints(self, folder: Path) -> list[ModelCheckpoint]:
        common = {"dirpath": folder, "enable_version_counter": False, "auto_insert_metric_name": False}
        out = [
            ModelCheckpoint(
                filename="selected", monitor=f"guarded/{self._given['select_by']}", mode="max",
                save_on_train_epoch_end=False, **common,
            ),
            ModelCheckpoint(filename="last", every_n_epochs=1, save_on_train_epoch_end=True, **common),
        ]  # fmt: skip
        if self._given["checkpoint_every"] > 0:
            out.append(
                ModelCheckpoint(
                    filename="last", every_n_train_steps=self._given["checkpoint_every"], **common
                )
            )
        return out

    def plain_config(self) -> dict[str, Any]:
        """The whole config as plain data, less what belongs to one start of the run."""
        self._dump_config()
        own = {"config", "run_dir", "ckpt_path", "weights_only"}
        return {k: v for k, v in self.config_dump.items() if k not in own}


def import_named_classes() -> None:
    """Import what a config may name by short class names: plugins, readers, views, schedules, diagnostics."""
    registry()
    importlib.import_module("uda.diagnostics")
    for module in sorted(set(data._WHERE.values())):
        importlib.import_module(f"uda.data.{module}")


def main(argv: list[str]) -> int:
    """Run one of the four commands.

    Returns:
        0, or 130 after Ctrl-C, with a word on how to go on.
    """
    quiet()
    import_named_classes()
    cli = UDACLI.__new__(UDACLI)
    try:
        cli.__init__(argv[0], argv[1:])
    except SystemExit as stop:
        if cli.__dict__.get("trainer") is None:  # --help, --print_config
            return int(stop.code or 0)
        return _stopped(cli, stop)
    except KeyboardInterrupt:
        return _stopped(cli, None)
    except BaseException:
        if (run := cli.__dict__.get("run")) is not None and not steps_done(cli):
            run.abandon()
        raise
    return 0


def steps_done(cli: UDACLI) -> int:
    """Optimiser steps of the run so far."""
    trainer = cli.__dict__.get("trainer")
    return 0 if trainer is None else trainer.global_step


def _stopped(cli: UDACLI, stop: SystemExit | None) -> int:
    """Exit code of a run that was stopped from outside."""
    run = cli.__dict__.get("run")
    if run is not None and cli.command == "fit" and is_first_rank():
        last = run.path / "checkpoints" / "last.ckpt"
        how = (
            f"go on with: uda fit --run_dir {run.path} --ckpt_path last"
            if last.is_file()
            else "no checkpoint yet"
        )
        print(f"uda: stopped before the end; {how}", file=sys.stderr)
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    return 143 if isinstance(stop, SIGTERMException) else 130
