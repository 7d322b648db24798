"""``uda fuse``: several trained networks as one, by optimal transport of their neurons."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uda.errors import UDAError

if TYPE_CHECKING:
    from torch import Tensor, nn


def main(argv: list[str]) -> int:
    """``uda fuse A.ckpt B.ckpt [...] [--output FILE] [--weights W W] [--metric ...] [--batchnorm ...]``.

    Returns:
        0.
    """
    args = parser().parse_args(argv[1:])
    out = args.output
    if out.exists() and not args.force:
        raise UDAError(f"--output {out}: it exists. Name another file, or overwrite it with --force.")
    if len(args.checkpoints) < 2:
        raise UDAError("uda fuse takes two checkpoints or more.")
    from uda.run.directory import check_exists

    for path in args.checkpoints:
        check_exists(path)
    import torch
    import yaml

    from uda.console import quiet

    quiet()
    needed = args.metric == "activations" or args.batchnorm == "recalibrate"
    samples = target_inputs(config_for(args), args.samples, args.seed) if needed else None
    options = {k: getattr(args, k) for k in ("weights", "metric", "squared", "normalise", "incoming", "batchnorm")}
    fused = fuse_checkpoints(args.checkpoints, samples=samples, align=not args.plain, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fused, out)
    print(f"{out}: {' + '.join(args.checkpoints)}; neurons stand as in {args.checkpoints[0]}")
    if fused["fused"]["plugins"]:
        print(f"plugins left out: {', '.join(fused['fused']['plugins'])}. Their state belongs to the single networks.")
    config = config_of(args.checkpoints[0])
    beside = out.parent / "config.yaml"
    text = yaml.safe_dump(config, sort_keys=False)
    if config is not None and (not beside.exists() or beside.read_text() == text):
        beside.write_text(text)
        print(f"evaluate: uda test --ckpt_path {out}")
    else:
        print(f"evaluate: uda test --ckpt_path {out} --config FILE, a config without plugins")
    print(f"train from it: uda fit --config FILE --model.init_from={out}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    out = argparse.ArgumentParser("uda fuse", allow_abbrev=False, description=(
        "One network from several, aligned neuron by neuron with optimal transport and averaged (Singh & Jaggi, "
        "NeurIPS 2020). MLPs and plain CNNs; nothing is trained."))  # fmt: skip
    out.add_argument("checkpoints", nargs="+", metavar="CKPT", help="the first gives widths, settings and order")
    out.add_argument("-o", "--output", type=Path, default=Path("fused/fused.ckpt"), help="(fused/fused.ckpt)")
    out.add_argument("--force", action="store_true", help="overwrite the output")
    out.add_argument("--weights", nargs="+", type=float, metavar="W", help="one a network, of sum 1 (equal)")
    out.add_argument("--metric", choices=("weights", "activations"), default="weights", help=(
        "compare neurons by incoming weights (weights: no data), or by activations on target images"))  # fmt: skip
    out.add_argument("--batchnorm", choices=("fold", "recalibrate"), default="fold", help=(
        "average the folded layers (fold), then also take new running statistics from target images"))  # fmt: skip
    out.add_argument("--samples", type=int, default=200, help="target images, unlabelled, where they are needed (200)")
    out.add_argument("--config", metavar="FILE", help="of the data (that of the first checkpoint's run)")
    out.add_argument("--seed", type=int, default=0, help="of the draw of samples (0)")
    out.add_argument("--squared", action="store_true", help="squared distances")
    out.add_argument("--normalise", action="store_true", help="neurons of unit length in the distances")
    out.add_argument("--incoming", choices=("marginal", "mass"), default="marginal", help=(
        "networks of unlike width: average incoming weights (the paper) or add them up"))  # fmt: skip
    out.add_argument("--plain", action="store_true", help="average without alignment, for comparison")
    return out


def fuse_checkpoints(paths: list[str], samples: Tensor | None = None, **options: Any) -> dict[str, Any]:
    """The fused checkpoint of several ones, with the settings of the first and without plugins.

    Args:
        paths: checkpoints of :class:`uda.UDA`; samples: unlabelled inputs, where an option needs them.
        **options: of :func:`~uda_transport.fusion.fuse_modules`.

    Returns:
        What ``torch.save`` writes: loads by ``uda test --ckpt_path``, ``load_from_checkpoint`` and ``model.init_from``.

    Raises:
        UDAError: no such model, unlike networks or classes, a plugin that is part of the network.
    """
    from uda_transport.fusion import fuse_modules

    checkpoints = [read(path) for path in paths]
    names = [c["hyper_parameters"].get("class_names") for c in checkpoints]
    for path, other in zip(paths[1:], names[1:], strict=True):
        if names[0] and other and list(other) != list(names[0]):
            raise UDAError(f"{path} was trained on classes {list(other)[:5]}..., {paths[0]} on {list(names[0])[:5]}...")
    nets = [network(c, path) for c, path in zip(checkpoints, paths, strict=True)]
    fused = fuse_modules(nets, samples=samples, **options)
    first = checkpoints[0]
    settings = {**first["hyper_parameters"], "plugins": {}, "init_from": None}  # Lightning's form, less its training
    plugins = sorted({key for c in checkpoints for key in c["hyper_parameters"].get("plugins") or {}})
    kept = {k: first[k] for k in ("pytorch-lightning_version", "hparams_name", "uda") if k in first}
    return {
        **kept, "epoch": 0, "global_step": 0, "hyper_parameters": settings,
        "state_dict": dict(fused.state_dict()), "fused": {"checkpoints": [str(p) for p in paths], "plugins": plugins},
    }  # fmt: skip


def read(path: str) -> dict[str, Any]:
    """A checkpoint of a model with its settings.

    Raises:
        UDAError: the file is none.
    """
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UDAError(f"{path} cannot be read as a checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not {"hyper_parameters", "state_dict"} <= set(found):
        raise UDAError(f"{path} is no checkpoint of uda fit: it lacks hyper_parameters or state_dict.")
    return found


def network(checkpoint: dict[str, Any], path: str) -> nn.Module:
    """Backbone, bottleneck and head of a checkpoint in one sequence, whose names are those of the state dict.

    Raises:
        UDAError: a plugin changed the network or its features, or the settings do not make one.
    """
    from collections import OrderedDict

    import torch
    from torch import nn

    import uda
    from uda.discovery import registry
    from uda.hooks import hooks_of

    settings = checkpoint["hyper_parameters"]
    for key, spec in (settings.get("plugins") or {}).items():
        if "transform_features" in hooks_of(registry().get(spec["class_path"])):
            raise UDAError(f"{path}: plugin {key!r} changes the features before the classifier, and cannot be fused.")
    bare = {"plugins": {}, "init_from": None, "channels_last": False, "compile_backbone": False}
    parts = ("backbone", "bottleneck", "head")
    state = {k: v for k, v in checkpoint["state_dict"].items() if k.split(".")[0] in parts}
    file = io.BytesIO()
    torch.save({**checkpoint, "hyper_parameters": {**settings, **bare}, "state_dict": state}, file)
    file.seek(0)
    try:
        model = uda.UDA.load_from_checkpoint(file, map_location="cpu", weights_only=True)
    except Exception as error:
        plugins = ", ".join(settings.get("plugins") or {}) or "none"
        raise UDAError(
            f"{path} does not load as a network without its plugins ({plugins}), which may have changed it: {error}"
        ) from error
    layers: OrderedDict[str, nn.Module] = OrderedDict((name, getattr(model, name)) for name in parts)
    return nn.Sequential(layers)


def config_of(path: str) -> dict[str, Any] | None:
    """The config of a checkpoint's run, less plugins and start weights; None where there is none."""
    import yaml

    from uda.run.directory import run_of_checkpoint

    file = run_of_checkpoint(path) / "config.yaml"
    if not file.is_file():
        return None
    config = yaml.safe_load(file.read_text())
    if isinstance(config.get("model"), dict):
        config["model"] = {k: v for k, v in config["model"].items() if k not in ("plugins", "init_from")}
    return config


def config_for(args: argparse.Namespace) -> str:
    """The config file that says where samples come from.

    Raises:
        UDAError: there is none.
    """
    from uda.run.directory import run_of_checkpoint

    path = args.config or str(run_of_checkpoint(args.checkpoints[0]) / "config.yaml")
    if args.config is None and not Path(path).is_file():
        raise UDAError(f"Samples are needed, and the run of {args.checkpoints[0]} has no config.yaml: give --config.")
    return path


def target_inputs(config: str, n: int, seed: int) -> Tensor:
    """At most ``n`` inputs ``[n, ...]`` of the target's training pool in the test view; no label is read."""
    import torch

    from uda.commands.inspect import built
    from uda.shift import features

    if n < 2:
        raise UDAError(f"--samples {n}: take two or more.")
    _, datamodule = built(["--config", config], "identity")
    pools = datamodule.task.target
    encoder = features.Encoder("inputs", "", lambda x: (x.flatten(1), None))
    rows = features.take(datamodule, pools, pools.train, encoder, n, seed).features
    return torch.from_numpy(rows).reshape(len(rows), *datamodule.input_shapes[pools.name])
