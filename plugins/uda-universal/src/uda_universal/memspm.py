"""Memory-assisted sub-prototype mining for universal adaptation (MemSPM: Lai et al., ICLR 2024)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.nn import full, gather_rows
from uda.passes import Pools
from uda_universal.dcc import DCC
from uda_universal.memory import address, first_memory, read

STARTS = ("both", "source", "random")
DECODERS = ("features", "input", "none")


class MemSPM(DCC):
    """Sees each sample through a memory of sub-prototypes: classes of several looks keep them apart.

    Features z are replaced, in training and in inference, by a weighted sum of the K nearest items of a memory, each of
    which is present by the nearest of its S sub-prototypes (:func:`address`). Classifier, clusters and alignment see
    that sum alone, and matching, alignment and rejection on it are those of :class:`~uda_universal.dcc.DCC`; a decoder
    gives z, or the input, back: ``L = CE + weight * CDD + reg_weight * w(p) * L_reg + rec_weight * L_rec``.

    The memory starts from a look at the domains at the first refresh after ``warmup``; until then features pass as they
    are, for looks of an encoder that has not learnt anything are none. Sub-prototypes that no sample has addressed
    since the last refresh are logged (``dead``, a share; ``alive``, a number). At the end of a fit
    ``memory/subprototypes.png`` in the run's directory shows what each of the most used ones holds.

    Published details are few. What is not published is an option: ``top``, ``memory_start``, ``address_temperature``.

    Args:
        items: N; subs: S. 500 items are more than a small target fills.
        top: K items that a sample addresses.
        threshold: a fixed threshold of the weights instead of the adaptive one.
        address_temperature: of the softmax over the memory. With 1, a plain softmax of cosines, the K weights are
            nearly equal.
        memory_start: ``both``, ``source`` (k-means of the domains' features) or ``random`` (normal, of length 1).
        rec_weight: of the reconstruction (0: no decoder).
        decoder: gives back ``features`` z (a constant), or the ``input``; hidden: width of its hidden layer.
        freeze: train neither backbone nor bottleneck, as published with CLIP's encoder.
        picture: write the picture.
        others: as in :class:`~uda_universal.dcc.DCC`.
    """

    search_space: ClassVar[dict[str, Any]] = {
        "weight": (0.01, 1.0, "log"), "rec_weight": (0.05, 2.0, "log"), "subs": [1, 5, 10, 20], "top": [3, 5, 10],
    }  # fmt: skip
    used: Tensor
    started: Tensor

    def __init__(
        self,
        items: int = 100,
        subs: int = 10,
        top: int = 5,
        threshold: float | None = None,
        address_temperature: float = 0.05,
        memory_start: str = "both",
        rec_weight: float = 0.5,
        decoder: str = "features",
        hidden: int = 256,
        freeze: bool = False,
        picture: bool = True,
        weight: float = 0.1,
        reg_weight: float = 1.0,
        ramp: float = 3.0,
        temperature: float = 0.1,
        refresh_every: int = 200,
        first: int = 0,
        step: int = 2,
        max_search: int = 3,
        falls: int = 4,
        min_samples: int = 3,
        settle: bool = True,
        starts: int = 3,
        warmup: float = 0.0,
        class_balanced: bool = True,
        kernels: int = 5,
        factor: float = 2.0,
    ) -> None:
        super().__init__(
            weight, reg_weight, ramp, temperature, refresh_every, first, step, max_search, falls, min_samples, settle,
            starts, warmup, class_balanced, kernels, factor,
        )  # fmt: skip
        check_choice("MemSPM", "memory_start", memory_start, STARTS)
        check_choice("MemSPM", "decoder", decoder, DECODERS)
        if min(items, subs, top, hidden) < 1 or address_temperature <= 0 or rec_weight < 0:
            raise uda.UDAError(
                "MemSPM: items, subs, top, hidden are 1 or more, address_temperature is positive, rec_weight 0 or more."
            )
        if threshold is not None and not 0 <= threshold < 1:
            raise uda.UDAError(f"MemSPM: threshold is a share in [0, 1), got {threshold}.")
        if top > items:
            raise uda.UDAError(f"MemSPM: top is {top}, but the memory has {items} items.")
        self.items, self.subs, self.top, self.threshold = items, subs, top, threshold
        self.address_temperature, self.memory_start = address_temperature, memory_start
        self.rec_weight, self.decoder_of, self.hidden = rec_weight, decoder if rec_weight else "none", hidden
        self.freeze, self.picture = freeze, picture
        self.memory: nn.Parameter | None = None
        self.decoder: nn.Module | None = None

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """The memory and its decoder."""
        super().build(model)
        if self.freeze:
            model.backbone.requires_grad_(False)
            model.bottleneck.requires_grad_(False)
        if self.memory is not None:
            return
        start = torch.randn(self.items, self.subs, model.feature_dim) / model.feature_dim**0.5
        self.memory = nn.Parameter(start)
        self.register_buffer("used", torch.zeros(self.items, self.subs))
        self.register_buffer("started", torch.tensor(self.memory_start == "random"))
        if self.decoder_of != "none":
            shape = model.input_shape if self.decoder_of == "input" else [model.feature_dim]
            size = int(torch.Size(shape).numel())
            if size > 3 * 64 * 64:
                raise uda.UDAError(
                    f"MemSPM: an input of {size} numbers is too large for its decoder: take decoder: features."
                )
            self.decoder = nn.Sequential(
                nn.Linear(model.feature_dim, self.hidden), nn.ReLU(), nn.Linear(self.hidden, size)
            )

    @uda.hookimpl
    def param_groups(self, model: uda.UDA) -> list[dict[str, Any]]:
        """The memory, without weight decay: it would draw what is not used to zero."""
        return [{"name": f"{self.key}.memory", "params": [self.memory], "weight_decay": 0.0}]

    def addressed(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`address` of features ``[B, F]`` with the options."""
        return address(z, self.memory, self.top, self.address_temperature, self.threshold)

    @torch.no_grad()
    def through(self, z: Tensor, rows: int = 1024) -> Tensor:
        """Features of a whole domain ``[M, F]`` as the memory gives them, ``rows`` at a time."""
        return torch.cat([read(self.memory, *self.addressed(part)) for part in z.split(rows)])

    @uda.hookimpl
    def transform_features(self, model: uda.UDA, batch: uda.DomainBatch, features: Tensor) -> Tensor | None:
        """The weighted sum of sub-prototypes in the place of the features, once there is a memory."""
        if not self.started:
            return None
        weights, item, sub = self.addressed(features)
        seen = read(self.memory, weights, item, sub).to(features.dtype)
        if torch.is_grad_enabled():
            entry = features.detach(), seen, item, sub, weights.detach()
            batch.cache.setdefault(f"{self.key}.seen", []).append(entry)
        return seen

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """A frozen encoder stays as it is, its running statistics too."""
        if self.freeze:
            step.model.backbone.eval()
            step.model.bottleneck.eval()

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Fill the memory, the first time; then cluster what it gives."""
        source, y = (torch.cat([getattr(p, name) for p in bank.sources.values()]) for name in ("features", "y"))
        target = bank.target.features
        if not self.started and model.progress >= self.warmup:
            look = source if self.memory_start == "source" else torch.cat([source, target])
            self.memory.data.copy_(first_memory(look, self.items, self.subs, model.base_seed))
            self.started.fill_(True)
            source, target = self.through(source), self.through(target)
        elif self.started and self.used.any():
            alive = (self.used > 0).sum().item()
            self.log_later(alive=float(alive), dead=1 - alive / self.used.numel())
            self.used.zero_()
        self.cluster(model, source, y, target)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """Those of DCC on what the memory gives, and the reconstruction in both domains."""
        out = super().align_features(step)
        if not self.started:  # nothing to read yet, but each parameter takes part in each step
            out["reconstruction"] = 0.0 * sum(full(p).sum() for p in self.parameters())
        elif self.decoder is not None:
            parts = []
            for batch in (*step.sources.values(), step.target):
                for z, seen, *_ in batch.cache[f"{self.key}.seen"]:
                    wanted = batch.x.flatten(1) if self.decoder_of == "input" else z
                    parts.append(F.mse_loss(full(self.decoder(seen)), full(wanted)))
            out["reconstruction"] = self.rec_weight * torch.stack(parts).mean()
        return out

    @uda.hookimpl
    def after_step(self, step: uda.Step) -> None:
        """Count which sub-prototypes were addressed."""
        super().after_step(step)
        if not self.started:
            return
        seen = [s for b in (*step.sources.values(), step.target) for s in b.cache.get(f"{self.key}.seen", ())]
        rows = gather_rows(torch.cat([(item * self.subs + sub)[weights > 0] for _, _, item, sub, weights in seen]))
        self.used += torch.bincount(rows, minlength=self.used.numel()).view_as(self.used)

    @uda.hookimpl
    def before_evaluation(self, model: uda.UDA) -> None:
        """At the end of a fit, the picture, or a word that there is no memory."""
        if not self.started and model.progress >= 1:
            rank_zero_warn(
                "MemSPM: no refresh came after the warm-up, so that its memory never started: lower refresh_every "
                f"({self.refresh_every}) or warmup ({self.warmup})."
            )
        if self.picture and self.started:
            from uda_universal.memory_view import write_at_the_end

            write_at_the_end(self, model)
