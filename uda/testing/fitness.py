"""Checks that need no second training: construction, lifecycle, checkpoint."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uda.described import describe
from uda.discovery import make_plugin
from uda.errors import UDAError
from uda.hooks import Hooks
from uda.module import UDA
from uda.plugin import HOOK_API, SETTINGS, Plugin
from uda.testing.bench import KEY, Bench, difference, state_of
from uda.testing.report import CheckFailed, Report

PLAIN = (bool, int, float, str, type(None), tuple)


def plain_attributes(plugin: Plugin) -> dict[str, Any]:
    """Attributes of a plugin that are numbers, names or tuples of these."""
    return {
        k: v for k, v in vars(plugin).items() if k not in ("key", "training") and isinstance(v, PLAIN)
    }  # fmt: skip


def construction(bench: Bench, report: Report) -> None:
    """Built from plain arguments, and built again equal from its description."""
    name = bench.cls.__name__

    def fail(wrong: str, remedy: str) -> CheckFailed:
        return CheckFailed(name, "construction", wrong, remedy)

    if unknown := set(bench.cls.settings) - set(SETTINGS):
        raise fail(f"unknown settings {sorted(unknown)}", f"choose from {', '.join(SETTINGS)}")
    if (api := getattr(bench.cls, "hook_api", HOOK_API)) != HOOK_API:
        raise fail(
            f"hook_api = {api}, but this uda offers {HOOK_API}",
            "port the plugin to this version of the hooks",
        )
    if unknown := set(bench.cls.search_space) - set(inspect.signature(bench.cls.__init__).parameters):
        raise fail(f"search_space names {sorted(unknown)}", "name constructor arguments only")
    try:
        plugin = bench.plugin()
    except Exception as error:
        raise fail(
            f"{name}(**{bench.init_args}) raised {type(error).__name__}: {error}",
            "give every argument a default that works, or pass init_args to check_plugin",
        ) from error
    plugin.key = KEY
    try:
        Hooks({KEY: plugin})
    except UDAError as error:
        raise fail(str(error), "the hooks and their arguments are in uda.hookspecs") from error
    if not bench.hooks:
        raise fail("it fills no hook", "mark each method that fills a hook with @uda.hookimpl")
    try:
        described = describe(plugin)
    except TypeError as error:
        raise fail(
            f"its arguments are no numbers and names ({error})",
            "take plain arguments (they are the YAML keys) and make objects in the constructor or in build",
        ) from error
    again = make_plugin(described)
    if describe(again) != described or plain_attributes(again) != plain_attributes(plugin):
        raise fail(
            "made again from its description it has other hyperparameters",
            "let the constructor depend on its arguments alone",
        )
    _undocumented(bench.cls, report)


def _undocumented(cls: type[Plugin], report: Report) -> None:
    text = "\n".join(c.__doc__ or "" for c in cls.__mro__ if issubclass(c, Plugin) and c is not Plugin)
    if not (cls.__doc__ or "").strip():
        report.warn("has no docstring: say what the method is, its equation and its source")
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        if (
            name != "self"
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            and not re.search(rf"\b{name}\b", text)
        ):
            report.warn(f"argument {name!r} is not in the docstring (Args:)")


def lifecycle(bench: Bench, report: Report) -> None:
    """Fit, validate, test and predict on a small task."""
    model, stage = bench.model(scores=bench.model_args.get("scores")), "fit"
    try:
        trainer = bench.train(model, limit_val_batches=1.0)
        for stage in ("validate", "test", "predict"):
            out = getattr(trainer, stage)(
                model, bench.data(), **({} if stage == "predict" else {"verbose": False})
            )
    except Exception as error:
        raise CheckFailed(
            bench.cls.__name__,
            "lifecycle",
            f"{stage} raised {type(error).__name__}: {error}",
            "read the traceback above; the task has 3 classes, batches of 8, and features of width 8",
        ) from error
    rows = torch.cat([batch["index"] for batch in out])
    label = torch.cat([batch["label"] for batch in out])
    score = torch.cat([batch["score"] for batch in out])
    if (
        len(rows) != len(trainer.datamodule.task.target.eval)  # fewer where data_args leave classes out
        or label.shape != rows.shape
        or not bool(((label >= 0) & (label < model.num_classes)).all())
    ):
        raise CheckFailed(
            bench.cls.__name__,
            "lifecycle",
            f"predict gave labels of shape {tuple(label.shape)} for {len(rows)} samples",
            "return one class id in [0, num_classes) a sample from predict, and mark unknowns in "
            "Prediction.unknown",
        )
    if score.is_floating_point() and not bool(score.isfinite().all()):
        raise CheckFailed(
            bench.cls.__name__, "lifecycle", "predict gave scores that are not finite", "check predict"
        )


def predictions(model: UDA, x: Tensor) -> dict[str, Tensor]:
    """Logits, labels, scores and unknown mask of inputs, in evaluation mode."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            batch = model.batch(x, index=torch.arange(len(x)))
            p = model.predict_batch(batch)
            out = {"logits": batch.logits, "label": p.label, "score": p.score}
            return out if p.unknown is None else {**out, "unknown": p.unknown}
    finally:
        model.train(training)


def inputs(bench: Bench, domain: str = "target") -> Tensor:
    """All inputs of a domain as inference sees them."""
    data = bench.data()
    return torch.cat([batch["x"] for batch in data.pool_dataloader(domain)])


def checkpoint(bench: Bench, report: Report) -> None:
    """Load, copy, pickle and build again without any change of the predictions."""
    name = bench.cls.__name__

    def fail(wrong: str, remedy: str) -> CheckFailed:
        return CheckFailed(name, "checkpoint", wrong, remedy)

    model = bench.model()
    trainer = bench.train(model)
    x = inputs(bench)
    expected = predictions(model, x)
    fresh, trained = bench.built().state_dict(), model.state_dict()
    for key in sorted(fresh.keys() ^ trained.keys()):
        raise fail(
            f"{key!r} is in the state dict only {'before' if key in fresh else 'after'} training",
            "make all parameters and buffers in build, at their final size",
        )
    for key, value in trained.items():
        if isinstance(value, Tensor) and fresh[key].shape != value.shape:
            raise fail(
                f"{key!r} grew from {tuple(fresh[key].shape)} to {tuple(value.shape)} in training",
                "give buffers a fixed size in build: a grown buffer does not load into a fresh model",
            )
    own = {f"plugins.{KEY}.{k}" for k in model.plugins[KEY].state_dict()}
    if missing := sorted(own - trained.keys()):
        raise fail(f"{missing[0]!r} is not under plugins.{KEY}.", "leave state_dict as nn.Module has it")
    path = str(Path(bench.folder) / "whole.ckpt")
    trainer.save_checkpoint(path)
    try:
        loaded = UDA.load_from_checkpoint(path, map_location="cpu", weights_only=True, **_unsaved(bench))
    except Exception as error:
        raise fail(
            f"load_from_checkpoint raised {type(error).__name__}: {error}",
            "keep numbers, names and tensors in the state (get_extra_state included), and take plain "
            "arguments",
        ) from error
    if wrong := difference(predictions(loaded, x), expected):
        raise fail(
            f"loaded from its checkpoint the model gives other {', '.join(wrong)}",
            "keep what inference uses in parameters or buffers (register_buffer), not in plain attributes",
        )
    _built_again(model, fail)
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise fail(f"copy.deepcopy raised {type(error).__name__}: {error}", _NO_CLOSURES) from error
    try:
        pickled = pickle.loads(pickle.dumps(model))
    except Exception as error:
        raise fail(f"pickle raised {type(error).__name__}: {error}", _NO_CLOSURES) from error
    for how, other in (("deepcopy", copied), ("pickle", pickled)):
        if wrong := difference(predictions(other, x), expected):
            raise fail(
                f"after {how} the model gives other {', '.join(wrong)}", "hold no reference to another model"
            )
        shared = {p.data_ptr() for p in state_pointers(model)} & {p.data_ptr() for p in state_pointers(other)}
        if shared:
            raise fail(
                f"after {how} the copy shares tensors with the original", "hold tensors in the plugin itself"
            )


_NO_CLOSURES = (
    "keep no lambda, open file, generator, lock or local function as an attribute: name a method or a "
    "function of the "
    "module instead"
)


def state_pointers(model: UDA) -> list[Tensor]:
    """Tensors of a model that hold memory."""
    return [t for t in [*model.parameters(), *model.buffers()] if t.numel()]


def _unsaved(bench: Bench) -> dict[str, Any]:
    backbone = bench.backbone() if bench.backbone else bench.model_args.get("backbone")
    return {"backbone": backbone} if isinstance(backbone, torch.nn.Module) else {}


def _built_again(model: UDA, fail: Any) -> None:
    modules = {n: id(m) for n, m in model.named_modules()}
    parameters = {n: id(p) for n, p in model.named_parameters()}
    before = state_of(model)
    model.hooks.all("build", model=model)
    changed = sorted(
        {n for n, m in model.named_modules() if modules.get(n) != id(m)}
        | (modules.keys() - dict(model.named_modules()).keys())
        | {n for n, p in model.named_parameters() if parameters.get(n) != id(p)}
        | set(difference(state_of(model), before))
    )
    if changed:
        raise fail(
            f"a second call of build changes {changed[0]!r}",
            "build runs before each fit and test: return at once when the parts are there (if self.head is "
            "None: ...)",
        )
