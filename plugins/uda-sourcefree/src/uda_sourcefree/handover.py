"""``uda export-source``: what the owner of a source hands over, as a file that says what it holds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uda.errors import UDAError

if TYPE_CHECKING:
    from torch import Tensor

    from uda.data import DataModule
    from uda.module import UDA

#: Settings of a model that its network is made from; nothing that names files or machines is among them.
ARCHITECTURE = (
    "backbone", "bottleneck", "bottleneck_norm", "bottleneck_dropout", "head", "num_classes", "class_names",
    "input_shape", "source_names", "target_name",
)  # fmt: skip
PARTS = ("backbone", "bottleneck", "head")


def main(argv: list[str]) -> int:
    """``uda export-source CKPT [-o FILE] [--statistics] [--config FILE] [--least N]``.

    Returns:
        0.
    """
    args = parser().parse_args(argv[1:])
    out = args.output or Path(args.checkpoint).with_suffix(".source.pt")
    if out.exists() and not args.force:
        raise UDAError(f"--output {out}: it exists. Name another file, or overwrite it with --force.")
    import torch
    import yaml

    from uda.commands.inspect import built
    from uda.console import quiet
    from uda.run.directory import check_exists, run_of_checkpoint

    quiet()
    check_exists(args.checkpoint)
    config = Path(args.config or run_of_checkpoint(args.checkpoint) / "config.yaml")
    if not config.is_file() and (args.statistics or args.config):
        raise UDAError(f"--config {config}: no such file; --statistics needs that of the source's run.")
    views = (yaml.safe_load(config.read_text()).get("data") or {}).get("views") if config.is_file() else None
    if args.statistics or (config.is_file() and views is None):
        data = built(["--config", str(config)], "identity")[1]
        views = views or default_preprocessing(data)
    file = handover(args.checkpoint, data if args.statistics else None, views, args.least)
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(file, out)
    print(f"{out}\n{file['contains']}")
    return 0


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    out = argparse.ArgumentParser("uda export-source", allow_abbrev=False, description=(
        "A hand-over file of a source model for source-free adaptation: weights, class names, preprocessing, and where "
        "asked for means and covariances of the classes. No sample of the source is in it."))  # fmt: skip
    out.add_argument("checkpoint", metavar="CKPT", help="of uda fit on the source")
    out.add_argument("-o", "--output", type=Path, help="(CKPT with the ending .source.pt)")
    out.add_argument("--force", action="store_true", help="overwrite the output")
    out.add_argument("--statistics", action="store_true", help="class means and covariances of the source's features")
    out.add_argument("--config", metavar="FILE", help="of the source's data (that of the checkpoint's run)")
    out.add_argument("--least", type=int, default=10, help="samples that a class needs to have statistics (10)")
    return out


def network(architecture: dict[str, Any]) -> UDA:
    """The network of an architecture, with weights as they come."""
    from jsonargparse import ArgumentParser

    from uda.arguments import instantiated
    from uda.module import UDA

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(UDA, "model", fail_untyped=False)
    return instantiated(parser, parser.parse_object({"model": architecture})).model


def handover(path: str, data: DataModule | None = None, views: Any = None, least: int = 10) -> dict[str, Any]:
    """What ``torch.save`` writes: serves as ``model.init_from``, and loads with ``weights_only=True``.

    Args:
        path: checkpoint of a source model.
        data: of the source's run, for class statistics of its training samples; None: none.
        views: preprocessing, in plain form.
        least: samples that a class needs for statistics.

    Raises:
        UDAError: no checkpoint; a network that a plugin has changed; several sources, or none; a class with fewer
            samples.
    """
    import torch

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    except Exception as error:
        raise UDAError(f"{path} cannot be read as a checkpoint of uda fit: {error}") from error
    out = {
        "hyper_parameters": {k: settings[k] for k in ARCHITECTURE if settings.get(k) is not None},
        "state_dict": {k: v.clone() for k, v in state.items() if k.split(".")[0] in PARTS},
        "preprocessing": views,
    }
    if "backbone" in out["hyper_parameters"]:  # else it was made by hand, and is made so again
        expected = network(out["hyper_parameters"]).state_dict().keys()
        if other := sorted(expected ^ out["state_dict"].keys()):
            raise UDAError(
                f"{path}: a plugin has changed the network in training ({other[0]!r}), which no file can hand over. "
                "Export a model that was trained without it."
            )
    said = "Weights and running statistics of backbone, bottleneck and head; architecture; names of classes and domains"
    said += f"; {'no ' if views is None else ''}preprocessing."
    if data is not None:
        from uda.commands.inspect import loaded

        out["class_statistics"] = statistics(loaded(path), data, least)
        said += " Mean and covariance of the features of each class, over training samples that are classified as it."
    out["contains"] = said + " No sample of the source, no feature, score or label of one, no optimiser state."
    return out


def default_preprocessing(data: DataModule) -> dict[str, Any] | None:
    """The transforms of a run that names none, which follow its data; None where these are not at hand."""
    from uda.described import describe

    try:
        return describe(data.transforms)
    except UDAError:
        return None


def statistics(model: UDA, data: DataModule, least: int = 10) -> dict[str, Tensor]:
    """Mean ``[C, F]`` and covariance ``[C, F, F]`` of each class's features; see :func:`class_gaussians`."""
    import torch

    if data.multi_label:
        raise UDAError("Statistics are of classes that exclude each other: multi-label data has none.")
    if len(data.source_names) != 1:
        raise UDAError(f"Statistics are those of one source, but data.source names {data.source_names or 'none'}.")
    if data.class_names != list(model.class_names or data.class_names):
        raise UDAError(
            f"The model was trained on classes {model.class_names[:5]}..., the data has {data.class_names[:5]}..."
        )
    features, logits, y = [], [], []
    with torch.no_grad():
        for batch in data.pool_dataloader(data.source_names[0]):
            domain = model.batch(batch["x"].to(model.device), role="source")
            features.append(domain.features.double().cpu())
            logits.append(domain.logits.cpu())
            y.append(batch["y"])
    predicted = torch.cat(logits).argmax(1)
    try:
        return class_gaussians(torch.cat(features), torch.cat(y), predicted, model.num_classes, least)
    except UDAError as error:
        raise UDAError(f"{data.source_names[0]}: {error} (classes: {data.class_names[:5]}...)") from error


def class_gaussians(features: Tensor, y: Tensor, predicted: Tensor, classes: int, least: int = 10) -> dict[str, Tensor]:
    """Mean and covariance of each class, over the samples of it that are classified as it (else over all of it).

    Args:
        features: ``[N, F]``; y, predicted: class ids ``[N]``; classes: C.
        least: samples that a class needs: the mean of one sample is that sample.

    Returns:
        ``means`` ``[C, F]`` and ``covariances`` ``[C, F, F]``, float32; their shapes do not depend on N.

    Raises:
        UDAError: a class with fewer samples.
    """
    import torch

    means, covariances = [], []
    for c in range(classes):
        own = features[(y == c) & (predicted == c)]
        own = own if len(own) >= least else features[y == c]
        if len(own) < max(least, 2):
            raise UDAError(
                f"class {c} has {len(own)} samples: statistics of fewer than {max(least, 2)} would tell of single ones"
            )
        means.append(own.mean(0))
        covariances.append(torch.cov(own.T).reshape(own.shape[1], own.shape[1]))
    return {"means": torch.stack(means).float(), "covariances": torch.stack(covariances).float()}
