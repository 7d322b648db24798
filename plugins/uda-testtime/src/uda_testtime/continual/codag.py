"""CoDAG: the model that generalises, trained on what adapted models say of one domain after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import uda
from uda.errors import UDAError
from uda.losses import classification_loss
from uda.nn import EMATeacher, full, no_autocast
from uda_testtime.continual.noisy_labels import noisy_label_loss, other_labels, phase_of
from uda_testtime.continual.randmix import randmix_view
from uda_testtime.views import PixelScale, view


def distillation(old: Tensor, new: Tensor) -> Tensor:
    """``KL(softmax(old) || softmax(new))`` of logits ``[B, C]``, mean over samples; ``old`` is a constant."""
    with no_autocast(new):
        return F.kl_div(full(new).log_softmax(1), full(old).detach().softmax(1), reduction="batchmean")


def read_tensors(path: str, what: str, keys: tuple[str, ...]) -> dict[str, Tensor]:
    """A file of tensors.

    Raises:
        UDAError: no such file, or without these keys.
    """
    if not Path(path).is_file():
        raise UDAError(f"CoDAG: {what}: there is no file {path!r}. `uda continual --generalise` writes it.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UDAError(f"CoDAG: {what}: {path!r} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict) or not set(keys) <= set(found):
        raise UDAError(f"CoDAG: {what}: {path!r} lacks {', '.join(keys)}.")
    return found


class CoDAG(uda.Plugin):
    """Train a model that generalises over a sequence of domains (Cho et al., ICCV 2023): one stage of it.

    Without ``labels`` it is the source's stage: ``weight * CE(RandMix(x), y)`` beside the source classification. With
    them a later one, without source: target and memory, and a RandMix view of both, by negative, selective and positive
    learning in turn (:func:`~uda_testtime.continual.noisy_labels.noisy_label_loss`), and
    ``distill * KL(model before || model)`` on target and memory. `uda continual --generalise` adapts, labels, and fills
    in both files. Feature rows get noise in the place of RandMix.

    Args:
        labels: file with the adapted model's label ``y`` ``[N]`` of each sample in the target's training pool.
        memory: file with exemplars ``x`` and labels ``y`` of earlier domains; None: no replay.
        weight, distill: of the two terms; the paper's were not at hand.
        phases: shares of the training at which selective and positive learning begin.
        threshold: of a label's probability, for positive learning (NLNL: 0.5).
        replay_batch: exemplars a step. mix: train on RandMix views as well.
    """

    settings = ("closed", "multi-source", "source-free")
    reruns_backbone = True

    def __init__(
        self, labels: str | None = None, memory: str | None = None, weight: float = 1.0, distill: float = 1.0,
        phases: tuple[float, float] = (1 / 3, 2 / 3), threshold: float = 0.5, replay_batch: int = 32, mix: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(weight, distill) < 0 or replay_batch < 1 or not 0 <= threshold < 1:
            raise UDAError("CoDAG: weight and distill are 0 or more, replay_batch 1 or more, threshold in [0, 1).")
        if len(phases) != 2 or not 0 <= phases[0] <= phases[1] <= 1:
            raise UDAError(f"CoDAG: phases are two shares of the training in ascending order, not {phases}.")
        if memory is not None and labels is None:
            raise UDAError("CoDAG: memory without labels: in the stage of the source there is nothing to remember.")
        self.labels, self.memory, self.weight, self.distill = labels, memory, weight, distill
        self.phases, self.threshold = tuple(phases), threshold
        self.replay_batch, self.mix = replay_batch, mix
        self.before: EMATeacher | None = None
        self.__dict__["files"] = {}  # read when training begins: a checkpoint is evaluated without them

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """The source in its stage, the target alone in the others."""
        return uda.DataNeeds(source=self.labels is None, target=self.labels is not None)

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the model before this stage."""
        if self.before is None and self.labels is not None and self.distill:
            self.before = EMATeacher(self._parts(model), buffers="copy")

    @staticmethod
    def _parts(model: uda.UDA) -> list[nn.Module]:
        return [model.backbone, model.bottleneck, model.head]

    @uda.hookimpl
    def prepare_batch(self, step: uda.Step) -> None:
        """Before the first step: read the files, and keep the model as it is."""
        if self.labels is None:
            return
        if not self.files:
            self._read(step)
        if step.index == 0 and self.before is not None:
            self.before.update(self._parts(step.model), 0.0)

    def _read(self, step: uda.Step) -> None:
        known = read_tensors(self.labels, "labels", ("y",))
        size = step.model.sizes[step.model.target_name]
        if len(known["y"]) != size:
            raise UDAError(f"CoDAG: {self.labels!r} has {len(known['y'])} labels, the target {size} samples.")
        self.files["y"] = known["y"].to(step.target.x.device)
        if self.memory is not None:
            kept = read_tensors(self.memory, "memory", ("x", "y"))
            if kept["x"].shape[1:] != step.target.x.shape[1:]:
                raise UDAError(
                    f"CoDAG: exemplars in {self.memory!r} are {list(kept['x'].shape[1:])}, the target's samples "
                    f"{list(step.target.x.shape[1:])}: use one size for all domains."
                )
            self.files.update(memory_x=kept["x"], memory_y=kept["y"])

    def _mixed(self, model: uda.UDA, x: Tensor) -> Tensor:
        datamodule: Any = getattr(model._trainer, "datamodule", None)
        views = getattr(datamodule, "views", None)
        scale = PixelScale(*(getattr(views, n, None) for n in ("mean", "std")))
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        with no_autocast(x):
            return view(x, scale, generator, None if x.dim() == 2 else randmix_view)

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """The source's stage, or a later one."""
        model = step.model
        if self.labels is not None:
            return self._later(step)
        if not (self.weight and self.mix):
            return {}
        x, y = (torch.cat([getattr(s, n) for s in step.sources.values()]) for n in ("x", "y"))
        logits = model.batch(self._mixed(model, x), role="source").logits
        return {"mixed": self.weight * classification_loss(logits, y)}

    def _later(self, step: uda.Step) -> dict[str, Tensor]:
        model, x = step.model, step.target.x
        plain_x, y = x, self.files["y"][step.target.index]
        if self.memory is not None:
            rows = torch.randint(len(self.files["memory_y"]), (self.replay_batch,))
            plain_x = torch.cat([x, self.files["memory_x"][rows].to(x)])
            y = torch.cat([y, self.files["memory_y"][rows].to(y)])
        mix = self.mix and self.weight > 0
        z = model.batch(torch.cat([plain_x, self._mixed(model, plain_x)]) if mix else plain_x).logits
        out = {}
        if self.weight:
            labels = torch.cat([y, y]) if mix else y
            phase = phase_of(step.progress, self.phases)
            other = other_labels(labels, z.shape[1])
            out["labels"] = self.weight * noisy_label_loss(z, labels, other, phase, self.threshold)
        if self.before is not None:
            with torch.no_grad():
                old = self.before(plain_x)
            out["distillation"] = self.distill * distillation(old, z[: len(plain_x)])
        return out
