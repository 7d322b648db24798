"""Checks before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from uda import running
from uda.errors import UDAError, nearest
from uda.selection.multilabel import MULTI_LABEL_SCORES
from uda.selection.registry import SCORES

if TYPE_CHECKING:
    from uda.module import UDA
    from uda.plugin import Plugin

_CHOICES = {
    "bottleneck_norm": ("batch", "layer", "none"),
    "head": ("linear", "weight_norm", "cosine"),
    "forward_mode": ("joint", "separate"),
    "gate_level": ("features", "bottleneck", "parameters"),
}
SPEC = (
    "num_classes", "class_names", "input_shape", "input_shapes", "sizes", "source_names", "target_name", "multi_label",
    "missing_classes",
)  # fmt: skip


def check_arguments(arguments: dict[str, Any]) -> None:
    """Refuse values that cannot work, naming the choices."""
    for name, choices in _CHOICES.items():
        if arguments[name] not in choices:
            raise UDAError(f"model.{name}: unknown value {arguments[name]!r}. {nearest(str(arguments[name]), choices)}")
    if not 0 <= arguments["label_smoothing"] < 1:
        raise UDAError(f"model.label_smoothing must be in [0, 1), got {arguments['label_smoothing']}.")
    for name in ("bottleneck", "manual_clip"):
        if arguments[name] is None or arguments[name] < 0:
            raise UDAError(f"model.{name} must be 0 (off) or positive, got {arguments[name]}.")
    if arguments["manual_accumulate"] < 1:
        raise UDAError(f"model.manual_accumulate must be 1 or more, got {arguments['manual_accumulate']}.")


def keyed(plugins: dict[str, Plugin]) -> dict[str, Plugin]:
    """Give each plugin its key; keys are names in checkpoints, logs and overrides."""
    seen: dict[int, str] = {}
    for key, plugin in plugins.items():
        if not key.isidentifier() or hasattr(nn.ModuleDict, key):
            raise UDAError(f"Plugin key {key!r} cannot be used: take a plain name such as 'align' or 'refine'.")
        if id(plugin) in seen:
            other = seen[id(plugin)]
            raise UDAError(f"One plugin object stands under two keys, {other!r} and {key!r}: make two objects.")
        seen[id(plugin)] = key
        plugin.key = key
    return plugins


def take_spec(model: UDA, datamodule: Any) -> None:
    """Fill in sizes and names from the data module, and check those that the model already has."""
    spec = getattr(datamodule, "spec", None)
    if spec is None:
        return
    if model.num_classes is not None and model.num_classes != spec["num_classes"]:
        raise UDAError(
            f"The model has {model.num_classes} classes, the data {spec['num_classes']}. Leave model.num_classes out, "
            "or name the classes of the model's training under data.classes."
        )
    if model.class_names and list(model.class_names) != list(spec["class_names"]):
        raise UDAError(
            f"The model was made for classes {model.class_names[:5]}..., the data has {spec['class_names'][:5]}...: "
            "give the same classes in the same order (data.classes)."
        )
    for name in SPEC:
        setattr(model, name, spec.get(name))
    model.missing_classes = model.missing_classes or {}
    model.hparams.update({name: spec.get(name) for name in SPEC})


def check_setting(model: UDA, datamodule: Any) -> None:
    """Refuse plugins that do not serve the label-set setting of the data.

    A method of the closed set may stand in an open or universal setting beside a plugin that rejects.

    Raises:
        UDAError: with the settings that the plugin serves.
    """
    setting = getattr(datamodule, "setting", None)
    if setting is None or getattr(datamodule, "any_method", False):
        return
    rejection = setting in ("open", "universal")
    if rejection and model.hooks.filled("reject"):
        return
    for key, plugin in model.plugins.items():
        if setting not in plugin.settings:
            help = "add a plugin that rejects unknown samples, such as Reject; " if rejection else ""
            raise UDAError(
                f"Plugin {key!r} ({type(plugin).__name__}) does not serve this run's setting, {setting!r}: it serves "
                f"{', '.join(plugin.settings)}. Take a method that does; {help}or set data.any_method: true to see how "
                "it fares (docs/settings.md)."
            )


def check_multi_label(model: UDA) -> None:
    """Refuse what cannot serve samples of several classes: plugins, heads, scores that choose.

    Raises:
        UDAError: with the name.
    """
    if not model.multi_label:
        return
    for key, plugin in model.plugins.items():
        if "multi-label" not in plugin.settings:
            raise UDAError(
                f"Plugin {key!r} ({type(plugin).__name__}) does not serve multi-label data: it takes a softmax over "
                "the classes, and here a sample may have several. `uda plugins` lists the settings of each method."
            )
    for callback in model.trainer.callbacks:
        name = str(getattr(callback, "monitor", None) or "").removeprefix("guarded/").removeprefix("select/")
        if name and name in SCORES and name not in MULTI_LABEL_SCORES:
            raise UDAError(
                f"Score {name!r} is of a softmax, and the data is multi-label: set select_by to one of "
                f"{', '.join(MULTI_LABEL_SCORES)}."
            )


def check_sources(model: UDA) -> None:
    """Refuse a plugin that aligns with sources in a run that another plugin makes source-free.

    Raises:
        UDAError: with both.
    """
    needs = dict(model.hooks.each("data_needs", model=model))
    without = [key for key, found in needs.items() if not found.source]
    if without and not model.started:
        rank_zero_warn(
            f"Plugin {without[0]!r} makes the run source-free, and the network is as it was built, with a classifier "
            "that was never trained: name a model of the source as model.init_from.",
            stacklevel=2,
        )
    for key in model.hooks.fillers("align_features") if without else ():
        if key not in without and "source-free" not in model.plugins[key].settings:
            names = [f"{k!r} ({type(model.plugins[k]).__name__})" for k in (key, without[0])]
            raise UDAError(
                f"Plugin {names[0]} aligns the sources with the target, but {names[1]} makes the run source-free. Keep "
                "one of them."
            )


def check_fit(model: UDA) -> None:
    """Checks that need the trainer.

    Raises:
        UDAError: unbounded training, a monitor on target labels, a strategy that the plugins cannot run under, a plugin
            that does not serve the setting, or one that needs the sources of a source-free run.
    """
    trainer = model.trainer
    check_setting(model, getattr(trainer, "datamodule", None))
    check_multi_label(model)
    check_sources(model)
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor and "oracle/" in str(monitor):
            raise UDAError(
                f"{type(callback).__name__} monitors {monitor!r}, which is made of target labels. Monitor a label-free "
                "score instead: select/im, select/entropy, ... (docs/selection.md)."
            )
    running.total_batches(model)
    model.score_options.check(model.source_names)
    manual = [k for k, p in model.plugins.items() if p.manual]
    if manual and trainer.precision == "16-mixed":
        raise UDAError(f"Plugin {manual[0]!r} steps by hand and has no loss scaling: use bf16-mixed or 32-true.")
    unused = [k for k, p in model.plugins.items() if p.unused_parameters]
    ddp = getattr(trainer.strategy, "_ddp_kwargs", None)
    if unused and ddp is not None and not ddp.get("find_unused_parameters"):
        raise UDAError(f"Plugin {unused[0]!r} needs trainer.strategy: ddp_find_unused_parameters_true.")


def check_adapt(model: UDA) -> None:
    """Conditions of test-time adaptation, once before the stream.

    Raises:
        UDAError: several processes with a method that does not average, or inference mode.
    """
    for key in model.hooks.fillers("adapt"):
        if model.trainer.world_size > 1 and not model.plugins[key].averages:
            raise UDAError(
                f"Plugin {key!r} adapts to a stream and would drift apart on several processes: use devices=1."
            )
    if model.hooks.filled("adapt") and torch.is_inference_mode_enabled():
        raise UDAError("Test-time adaptation needs gradients: use Trainer(inference_mode=False).")
