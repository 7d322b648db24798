"""``uda inspect``: a look at the shift between source and target before training."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from uda.errors import UDAError

STYLES = {"fact": "", "advice": "bold", "warning": "yellow"}


def main(argv: list[str]) -> int:
    """``uda inspect --config FILE [--checkpoint FILE] [--backbone NAME] [--json FILE] [data and model settings]``.

    Returns:
        0.
    """
    args, rest = parser().parse_known_args(argv[1:])
    # what is quick to tell comes before what takes seconds to import
    if args.checkpoint:
        from uda.run.directory import check_exists, run_of_checkpoint

        check_exists(args.checkpoint)
        config = run_of_checkpoint(args.checkpoint) / "config.yaml"
        if config.is_file() and not any(word.partition("=")[0] in ("-c", "--config") for word in rest):
            rest = ["--config", str(config), *rest]
    if args.json and not args.json.absolute().parent.is_dir():
        raise UDAError(f"--json {str(args.json)!r}: there is no folder {str(args.json.absolute().parent)!r}.")
    if not rest:
        raise UDAError("uda inspect needs data: --config FILE, or --data.reader=... with --data.source and .target")
    model, datamodule = built(rest, args.backbone)
    from uda.shift.inspect import inspect_shift

    path = args.checkpoint or model.init_from or ""
    trained = loaded(path) if path else None
    model.backbone.to(device())
    options = {k: getattr(args, k) for k in ("max_samples", "held_out", "near", "seed", "permutations", "draws")}
    found = inspect_shift(
        datamodule, model.backbone, model=trained, checkpoint=path, mode=args.features,
        progress=tell, **options,
    )  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    show(found)
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command itself; others are settings of the data and the model, as in ``uda fit``."""
    out = argparse.ArgumentParser(
        "uda inspect",
        description="A look at the shift between source and target before training; target labels are never read.",
        epilog="--config FILE, --data.SETTING=VALUE and --model.SETTING=VALUE as in `uda fit`.",
        allow_abbrev=False,
    )
    out.add_argument("--checkpoint", metavar="FILE", help="of a source model: its features and its classifier")
    out.add_argument("--backbone", metavar="NAME", help="in place of the config's (pretrained weights: by --config)")
    out.add_argument("--features", choices=("auto", "backbone", "inputs"), default="auto", help=(
        "auto: the inputs where the backbone starts at random and they are small"))  # fmt: skip
    out.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    out.add_argument("--max_samples", type=int, default=2000, help="rows drawn of each side (2000)")
    out.add_argument("--held_out", type=float, default=0.4, help="share of the source to test its classifier on (0.4)")
    out.add_argument("--near", type=float, default=0.98, help="cosine above which rows are near duplicates (0.98)")
    out.add_argument("--permutations", type=int, default=999, help="of the MMD test (999)")
    out.add_argument("--draws", type=int, default=200, help="of the bootstrap (200)")
    out.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    return out


def tell(text: str) -> None:
    """Progress, on stderr."""
    print(f"uda inspect: {text} ...", file=sys.stderr, flush=True)


def built(argv: list[str], backbone: str | None, command: str = "inspect") -> tuple[Any, Any]:
    """Model and data module of a config with overrides; the model serves its backbone.

    Args:
        argv: configs and overrides; backbone: in place of the config's; command: whose options they are, for messages.

    Raises:
        UDAError: anything that is wrong with a config or an option.
    """
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    from uda import data
    from uda.arguments import Arguments, instantiated
    from uda.console import quiet, short_parser_error
    from uda.lightning_cli import import_named_classes
    from uda.module import UDA

    class Parts(LightningCLI):
        """Model and data of a config, and no trainer."""

        def parse_arguments(self, parser: Any, args: Any) -> None:
            with tempfile.TemporaryDirectory(prefix="uda-") as folder:
                import lightning

                sections = {"model": UDA, "data": data.DataModule, "trainer": lightning.Trainer}
                words = Arguments(command, sections, Path(folder)).prepare(args)
                # before the config, which has a backbone of its own most often
                first = [] if any("model" in (self._keys(w) or ()) for w in words) else ["--model.backbone=identity"]
                last = [f"--model.backbone={backbone}"] if backbone else []
                try:
                    self.config = parser.parse_args([*first, *words, *last])
                except ArgumentError as error:
                    raise UDAError(short_parser_error(str(error))) from error

        @staticmethod
        def _keys(word: str) -> Any:
            import yaml

            name, _, value = word.partition("=")
            return yaml.safe_load(Path(value).read_text()) if name == "--config" else [name[2:].split(".")[0]]

        def instantiate_classes(self) -> None:
            self.config_init = instantiated(self.parser, self.config)
            self.model, self.datamodule = self.config_init["model"], self.config_init["data"]

    quiet()
    import_named_classes()
    cli = Parts(
        UDA, data.DataModule, run=False, save_config_callback=None, seed_everything_default=0,
        auto_configure_optimizers=False, parser_kwargs={"exit_on_error": False}, args=argv,
    )  # fmt: skip
    return cli.model, cli.datamodule


def loaded(path: str) -> Any:
    """The model of a checkpoint, ready for use.

    Raises:
        UDAError: no checkpoint of a :class:`uda.UDA`.
    """
    from uda.module import UDA

    try:
        model = UDA.load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except UDAError:
        raise
    except Exception as error:
        raise UDAError(f"--checkpoint {path!r} cannot be loaded as a model: {type(error).__name__}: {error}") from error
    return model.to(device()).eval()


def device() -> str:
    """Where features are computed."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def show(found: dict[str, Any]) -> None:
    """The verdict, then every statement."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    target = found["data"]["target"]["name"]
    title = f"{', '.join(found['data']['sources'])} -> {target}"
    table = Table("about", "figures", title=title, show_lines=console.is_terminal)
    table.columns[0].no_wrap = True
    for one in found["statements"]:
        style = STYLES[one["level"]]
        table.add_row(Text(one["about"], style), Text(one["text"], style))
    console.print(table)
    verdict = found["verdict"]
    adapt = {"yes": "worth adapting", "caution": "adapt with caution", "no": "do NOT adapt"}[verdict["adapt"]]
    console.print(Text(f"{verdict['text']}: {adapt}  ({found['seconds']:.1f} s)", "bold"))
