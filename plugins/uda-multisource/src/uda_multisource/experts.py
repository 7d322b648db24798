"""Several source models in one network: what multi-source-free methods adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from uda_sourcefree.handover import ARCHITECTURE, network

import uda
from uda.nn import domain_feature_size, no_autocast
from uda.nn.precision import full


class ExpertInput(nn.Module):
    """What an expert sees of a batch: resized, in its channels, and normalised as in its training.

    Args:
        size: side of its images; None: as they come. channels: 1 (their mean) or 3 (repeated); None: as they come.
        mean, std: numbers, or one a channel; of inputs as the target's test view gives them (0 and 1: leave them).
    """

    def __init__(
        self,
        size: int | None = None,
        channels: int | None = None,
        mean: float | list[float] = 0.0,
        std: float | list[float] = 1.0,
    ) -> None:
        super().__init__()
        self.size, self.channels = size, channels
        self.mean, self.std = (list(v) if isinstance(v, list | tuple) else [float(v)] for v in (mean, std))
        if min(self.std) <= 0:
            raise uda.UDAError(f"The std of an expert's inputs must be positive, not {std}.")

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` as the expert takes it."""
        if self.channels is not None and x.ndim == 4 and x.shape[1] != self.channels:
            x = x.mean(1, keepdim=True) if self.channels == 1 else x[:, :1].expand(-1, self.channels, -1, -1)
        if self.size is not None and x.ndim == 4 and x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        if self.mean == [0.0] and self.std == [1.0]:
            return x
        shape = (-1, *[1] * (x.ndim - 2))
        return (x - x.new_tensor(self.mean).view(shape)) / x.new_tensor(self.std).view(shape)


class Split(nn.Module):
    """Modules side by side, each on its own part of the columns: ``[B, sum D_i] -> [B, sum F_i]``.

    With ``inputs``, all see the same batch, each through its own :class:`ExpertInput`.
    """

    def __init__(self, parts: list[nn.Module], widths: list[int], inputs: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.parts, self.widths = nn.ModuleList(parts), list(widths)
        self.inputs = None if inputs is None else nn.ModuleList(inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Results side by side."""
        xs = x.split(self.widths, 1) if self.inputs is None else [look(x) for look in self.inputs]
        return torch.cat([part(x) for part, x in zip(self.parts, xs, strict=True)], 1)


class ExpertHead(nn.Module):
    """The experts' classifiers and their weights ``w``: softmax of ``mixture`` ``[M]``, which starts even.

    Args:
        heads: M classifiers; widths: their numbers of features; mix: ``logits``, ``sum_i w_i z_i``, or ``probs``,
            ``log sum_i w_i softmax(z_i)``.
    """

    def __init__(self, heads: list[nn.Module], widths: list[int], mix: str) -> None:
        super().__init__()
        self.heads, self.widths, self.mix = nn.ModuleList(heads), list(widths), mix
        self.mixture = nn.Parameter(torch.zeros(len(heads)))

    @property
    def weights(self) -> Tensor:
        """``w`` ``[M]``, of sum 1."""
        return self.mixture.softmax(0)

    def each(self, features: Tensor) -> Tensor:
        """Logits of each expert ``[B, M, C]``."""
        return torch.stack([h(f) for h, f in zip(self.heads, features.split(self.widths, 1), strict=True)], 1)

    def joined(self, logits: Tensor) -> Tensor:
        """``[B, M, C] -> [B, C]``."""
        with no_autocast(logits):
            logits, w = full(logits), self.weights[None, :, None]
            return (w * logits).sum(1) if self.mix == "logits" else (w.log() + logits.log_softmax(2)).logsumexp(1)

    def forward(self, features: Tensor) -> Tensor:
        """``[B, sum F_i] -> [B, C]``."""
        return self.joined(self.each(features))


def read(path: str, who: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor] | None]:
    """Architecture, weights and, where it has them, class statistics in a checkpoint or hand-over file of a source.

    Raises:
        UDAError: no such file, or no model of this library in it.
    """
    if not Path(path).is_file():
        raise uda.UDAError(f"{who}: no checkpoint {path!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        settings, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        architecture = {k: settings[k] for k in ARCHITECTURE if settings.get(k) is not None}
        return architecture, state, checkpoint.get("class_statistics")
    except Exception as error:
        raise uda.UDAError(f"{who}: {path!r} cannot be read as a checkpoint of uda fit: {error}") from error


class Experts(uda.Plugin):
    """Base: the network becomes several source models side by side, their features ``[B, sum F_i]`` one after another.

    No source data take part (``data.source: null``). Backbone, bottleneck and head of the run give way to those of the
    checkpoints, each with the inputs it was trained on. The classifiers are frozen.

    Args:
        checkpoints: of the source models, as ``uda fit`` or ``uda export-source`` writes them; two or more, with the
            classes of the run.
        inputs: for each checkpoint the arguments of :class:`ExpertInput`, ``{size, channels, mean, std}``; None: all
            take the batch as it is.
        architectures: settings that make the networks; filled in from the checkpoints, and kept with the model, so that
            a trained one is loaded without them.
    """

    settings = ("closed", "source-free", "multi-source")
    mix = "logits"
    freeze_mixture = False

    def __init__(
        self,
        checkpoints: list[str],
        inputs: list[dict[str, Any]] | None = None,
        architectures: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(checkpoints, str) or len(checkpoints) < 2:
            raise uda.UDAError(f"{name} needs two checkpoints or more; for one there are SHOT, NRC and AaD.")
        if inputs is not None and len(inputs) != len(checkpoints):
            raise uda.UDAError(f"{name}: {len(checkpoints)} checkpoints but {len(inputs)} inputs; give one for each.")
        self.statistics: list[dict[str, Tensor] | None] = []
        self.checkpoints, self.architectures = [str(c) for c in checkpoints], architectures
        try:
            self.looks = [ExpertInput(**(given or {})) for given in (inputs or [{} for _ in checkpoints])]
        except TypeError as error:
            raise uda.UDAError(f"{name}: inputs take size, channels, mean and std: {error}") from error

    def start_files(self) -> list[str]:
        """The checkpoints, while they are there."""
        return [path for path in self.checkpoints if Path(path).is_file()]

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The target alone, whole at the start of each epoch."""
        return uda.DataNeeds(source=False, refresh={"target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Put the source models in the place of the network.

        Raises:
            UDAError: a checkpoint that is not there, of other classes, or for other inputs.
        """
        if isinstance(model.head, ExpertHead):
            return
        name, states = type(self).__name__, []
        here = [Path(c).is_file() for c in self.checkpoints]
        if self.architectures is None or all(here):
            found = [read(c, name) for c in self.checkpoints]
            self.architectures, states = [a for a, _, _ in found], [s for _, s, _ in found]
            self.statistics = [s for _, _, s in found]
        nets = [network(a) for a in self.architectures]
        for path, net, state in zip(self.checkpoints, nets, states, strict=bool(states)):
            own = net.state_dict()
            taken = {k: v for k, v in state.items() if k in own}
            if missing := sorted(own.keys() - taken.keys()):
                raise uda.UDAError(f"{name}: {path!r} lacks {missing[0]!r}: a plugin changed its network in training.")
            net.load_state_dict(taken)
        sizes = [self._checked(model, *given) for given in zip(self.checkpoints, nets, self.looks, strict=True)]
        widths = [net.feature_dim for net in nets]
        for net in nets:
            net.head.requires_grad_(False)
        model.backbone = Split([net.backbone for net in nets], sizes, self.looks)
        model.bottleneck = Split([net.bottleneck for net in nets], sizes)
        model.head = ExpertHead([net.head for net in nets], widths, self.mix)
        model.head.mixture.requires_grad_(not self.freeze_mixture)
        model.feature_dim = sum(widths)
        model.started = True
        self._remember(model)

    def _checked(self, model: uda.UDA, path: str, net: uda.UDA, look: ExpertInput) -> int:
        """Width of an expert's backbone, for the inputs of this run."""
        name = type(self).__name__
        theirs, ours = net.class_names or [], model.class_names or []
        if net.num_classes != model.num_classes or (theirs and ours and list(theirs) != list(ours)):
            raise uda.UDAError(
                f"{name}: {path!r} was trained on {net.num_classes} classes {list(theirs)[:5]}..., this run has "
                f"{model.num_classes}: {list(ours)[:5]}.... Give the same classes in the same order (data.classes)."
            )
        try:
            seen = nn.Sequential(look, net.backbone)
            width = domain_feature_size(seen, {model.target_name: model.input_shape}, model.target_name)
            with torch.no_grad():
                net.bottleneck.eval()(torch.zeros(1, width))  # a larger image may give more features
            return width
        except (uda.UDAError, RuntimeError) as error:
            raise uda.UDAError(
                f"{name}: {path!r} was trained on inputs of shape {net.input_shape} and refuses those of this run, "
                f"{list(model.input_shape)}; say under inputs what it takes (size, channels). {error}"
            ) from error

    def _remember(self, model: uda.UDA) -> None:
        """Keep the architectures with the settings that go into checkpoints."""
        self.__dict__.setdefault("_init_args", {})["architectures"] = self.architectures
        entry = (model.hparams.get("plugins") or {}).get(self.key)
        if isinstance(entry, dict):
            entry.setdefault("init_args", {})["architectures"] = self.architectures
