"""What a checkpoint holds and how one is taken in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from uda.described import describe
from uda.errors import UDAError
from uda.nn import spread_batchnorm

if TYPE_CHECKING:
    from uda.module import UDA

INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments as names and numbers, so that ``load_from_checkpoint`` works with ``weights_only``.

    An object without a plain form (a hand-made ``nn.Module``) is left out: it must be given again when loading.
    """
    out = {}
    for name, value in arguments.items():
        if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
            path = f"{value.func.__module__}.{value.func.__qualname__}"
            out[name] = {"class_path": path, "init_args": dict(value.keywords)}
            continue
        try:
            out[name] = describe(value)
        except TypeError:
            continue
    return out


def remember(model: UDA, arguments: dict[str, Any]) -> None:
    """Store hyperparameters: the config where the command line built the model, plain arguments otherwise."""
    from lightning.pytorch.core.mixins import hparams_mixin

    given = getattr(hparams_mixin, "_given_hyperparameters", None)
    if given is not None and given.get() is not None:
        model.save_hyperparameters(dict(given.get()))
    else:
        model.save_hyperparameters({**plain_arguments(arguments), "_instantiator": INSTANTIATOR})


def without_downloads(hparams: dict[str, Any]) -> dict[str, Any]:
    """Hyperparameters whose networks start at random, so that loading fetches none.

    The checkpoint holds the weights of the backbone; a network among a plugin's arguments is the plugin's affair.
    """
    out = {**hparams, "backbone": _blank(hparams.get("backbone"))} if "backbone" in hparams else dict(hparams)
    for key, entry in (hparams.get("plugins") or {}).items():
        if isinstance(entry, dict) and isinstance(entry.get("init_args"), dict):
            arguments = {k: _blank(v) for k, v in entry["init_args"].items()}
            out["plugins"] = {**out["plugins"], key: {**entry, "init_args": arguments}}
    return out


def _blank(value: Any) -> Any:
    if not (isinstance(value, dict) and "class_path" in value and isinstance(value.get("init_args"), dict)):
        return value
    blank = {"pretrained": False, "weights": None}
    return {**value, "init_args": {k: blank.get(k, v) for k, v in value["init_args"].items()}}


def plugin_keys(state: dict[str, Any]) -> set[str]:
    """Keys of the plugins that have parameters or buffers in a state dict."""
    return {name.split(".")[1] for name in state if name.startswith("plugins.")}


def check_resume(model: UDA, state: dict[str, Any]) -> None:
    """Refuse a checkpoint that does not fit, by name, before Lightning's list of tensor names would.

    Raises:
        UDAError: plugin missing in the checkpoint or in the model, other class count, other backbone.
    """
    own = model.state_dict()
    if lacking := sorted(plugin_keys(own) - plugin_keys(state)):
        raise UDAError(
            f"The checkpoint has no state for plugin {lacking[0]!r}, which this run uses. To start this run from its "
            "weights, use model.init_from instead of ckpt_path; to resume, use the config that wrote it."
        )
    if extra := sorted(plugin_keys(state) - plugin_keys(own)):
        raise UDAError(
            f"The checkpoint holds plugin {extra[0]!r}, which this run does not use. Add it to model.plugins, or start "
            "from the weights with model.init_from."
        )
    for name in ("head", "backbone", "bottleneck"):
        _same_shapes(name, own, state, "ckpt_path")


def _same_shapes(part: str, own: dict[str, Any], state: dict[str, Any], where: str) -> None:
    mine = {k: tuple(v.shape) for k, v in own.items() if k.startswith(part + ".") and hasattr(v, "shape")}
    theirs = {k: tuple(v.shape) for k, v in state.items() if k.startswith(part + ".") and hasattr(v, "shape")}
    if mine == theirs:
        return
    different = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
    k = different[0]
    raise UDAError(
        f"The {part} of this run does not fit the checkpoint given as {where}: {len(different)} tensors differ, "
        f"the first is {k!r} ({mine.get(k, 'absent')} here, {theirs.get(k, 'absent')} there). Use the same "
        "backbone, bottleneck, head and classes as the run that wrote it."
    )


def read_start(path: str) -> dict[str, Any]:
    """The checkpoint or hand-over file that a model starts from.

    Raises:
        UDAError: no such file, or no weights in it.
    """
    if not Path(path).is_file():
        raise UDAError(f"model.init_from: no file {path!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UDAError(f"model.init_from: {path!r} cannot be read as a checkpoint: {error}") from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise UDAError(f"model.init_from: {path!r} holds no weights of a model.")
    return checkpoint


def init_from(model: UDA, path: str) -> None:
    """Take backbone, bottleneck and head from a checkpoint, weights only; plugins and optimiser start fresh.

    Raises:
        UDAError: no such file, no model in it, another architecture or class set, or weights that are no numbers.
    """
    checkpoint, file = read_start(path), Path(path)
    state = spread_batchnorm(model, checkpoint.get("state_dict", checkpoint))
    own = model.state_dict()
    theirs = (checkpoint.get("hyper_parameters") or {}).get("class_names")
    if theirs and model.class_names and list(theirs) != list(model.class_names):
        raise UDAError(
            f"model.init_from: {file.name} was trained on classes {list(theirs)[:5]}..., this run has "
            f"{list(model.class_names)[:5]}.... Give the same classes in the same order (data.classes)."
        )
    for part in ("backbone", "bottleneck", "head"):
        _same_shapes(part, own, state, f"model.init_from ({file.name})")
    taken = {k: v for k, v in state.items() if k.split(".")[0] in ("backbone", "bottleneck", "head")}
    if bad := [k for k, v in taken.items() if not bool(v.isfinite().all())]:
        raise UDAError(f"model.init_from: {file.name} has NaN or infinite weights, the first in {bad[0]!r}.")
    model.load_state_dict(taken, strict=False)
    model.started = True
    rank_zero_info(f"Weights of backbone, bottleneck and head taken from {file.name}.")
