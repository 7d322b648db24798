"""A callback that follows the representations of a run: how far they move, and how alike domains and layers are."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from uda.data.batches import Request
from uda.diagnostics.cka import covariance_similarity, deconfound, explained_by, gram, kernel_similarity
from uda.errors import UDAError, nearest
from uda.step import DomainBatch


def pooled(output: Any) -> Tensor:
    """One row a sample ``[n, F]``: feature maps are averaged over places, token sequences over tokens."""
    x = output[0] if isinstance(output, (tuple, list)) else output
    if x.ndim == 3:
        return x.mean(1)
    return x.flatten(2).mean(2) if x.ndim > 3 else x


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of modules by name while they run, pooled, in float32 on the CPU."""
    rows: dict[str, list[Tensor]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: rows[name].append(pooled(output).detach().float().cpu())

    handles = [m.register_forward_hook(keep(name)) for name, m in modules.items()]
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class RepresentationSimilarity(L.Callback):
    """Compare the representations of fixed probe samples of each domain, at the start and after each epoch.

    * ``similarity/<domain>/<layer>``: CKA with the representation at the start of the run, deconfounded by the inputs
      (dCKA: Cui et al. 2022). 1: adaptation has left the layer as it was on this domain.
    * ``covariance/<source>/<layer>``: :func:`~uda.diagnostics.covariance_similarity` of that source and the target.
    * in the file ``similarity.json`` of the run as well: the similarity of each two layers, by domain, and the share
      of each layer's kernel that the inputs explain.

    It reads the training pools' inputs in the test view and no label, changes neither weights nor random numbers, and
    computes on the first rank alone. Under ``trainer.callbacks``::

        - class_path: uda.diagnostics.RepresentationSimilarity
          init_args: {layers: [backbone, bottleneck], samples: 256}

    Args:
        layers: names of modules of the model whose output is looked at, as ``model.named_modules()`` gives them; None:
            ``backbone``, ``bottleneck`` and ``head``.
        samples: probe samples a domain, drawn once by ``seed``. Checkpoints hold ``samples^2`` numbers a layer and
            domain.
        every_n_epochs: epochs between two looks.
        deconfound: take the inputs' similarity out of both kernels.
        unbiased: the unbiased estimate of HSIC, which few samples and many features do not push towards 1.
        file: name of the file in the run's directory; None: no file.
        batch_size: samples a forward.
        seed: of the choice of probes.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        samples: int = 256,
        every_n_epochs: int = 1,
        deconfound: bool = True,
        unbiased: bool = True,
        file: str | None = "similarity.json",
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        if samples < 4 or every_n_epochs < 1 or batch_size < 1:
            raise UDAError("RepresentationSimilarity: samples is at least 4, every_n_epochs and batch_size at least 1.")
        self.layers, self.samples, self.every_n_epochs = layers, samples, every_n_epochs
        self.deconfound, self.unbiased, self.file = deconfound, unbiased, file
        self.batch_size, self.seed = batch_size, seed
        self.start: dict[str, dict[str, Tensor]] = {}  # kernels [n, n] at the start, by domain and layer
        self.rows: list[dict[str, Any]] = []

    # ------------------------------------------------------------------------------------------- looking

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        known = dict(model.named_modules())
        names = self.layers or ["backbone", "bottleneck", "head"]
        for name in names:
            if not name or name not in known:
                raise UDAError(f"RepresentationSimilarity: no layer {name!r}. {nearest(str(name), known)}")
        return {name: known[name] for name in names}

    def probes(self, size: int) -> Tensor:
        """Positions of the probe samples in a pool of ``size``, in order."""
        random = torch.Generator().manual_seed(self.seed)
        return torch.randperm(size, generator=random)[: self.samples].sort().values

    @torch.no_grad()
    def look(self, trainer: L.Trainer, model: Any) -> dict[str, dict[str, Tensor]]:
        """Activations ``[n, F]`` by domain and layer; the inputs stand under the name ``""``."""
        datamodule = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "pool_dataloader"):
            raise UDAError("RepresentationSimilarity takes its probes from a uda.DataModule: fit with one.")
        modules = self._modules(model)
        modes = {m: m.training for m in model.modules()}
        out = {}
        model.eval()
        try:
            for name in [*model.source_names, model.target_name]:
                dataset = datamodule.pool_dataloader(name).dataset
                role = "target" if name == model.target_name else "source"
                inputs = []
                with recorded(modules) as rows, trainer.precision_plugin.val_step_context():
                    for positions in self.probes(len(dataset)).split(self.batch_size):
                        batch = dataset[Request(positions.numpy(), 0)]
                        inputs.append(batch["x"].flatten(1).float())
                        data = {k: batch[k].to(model.device) for k in ("x", "index")}
                        _ = DomainBatch(model, name, role, data).logits
                if silent := [layer for layer, found in rows.items() if len(found) != len(inputs)]:
                    raise UDAError(
                        f"RepresentationSimilarity: layer {silent[0]!r} does not run once in a forward of the model."
                    )
                out[name] = {"": torch.cat(inputs), **{layer: torch.cat(found) for layer, found in rows.items()}}
        finally:
            for module, training in modes.items():
                module.training = training
        return out

    def kernels(self, activations: dict[str, Tensor]) -> dict[str, Tensor]:
        """Kernels ``[n, n]`` of a domain's layers, less what the inputs explain."""
        inputs = gram(activations[""])
        found = {layer: gram(x) for layer, x in activations.items() if layer}
        return {layer: deconfound(k, inputs) for layer, k in found.items()} if self.deconfound else found

    def compare(self, seen: dict[str, dict[str, Tensor]], target: str) -> dict[str, Any]:
        """All similarities of one look, by kind: ``start``, ``layers``, ``explained``, ``covariance``."""
        row: dict[str, Any] = {"start": {}, "layers": {}, "explained": {}, "covariance": {}}
        for domain, activations in seen.items():
            kernels = self.kernels(activations)
            start = self.start[domain]
            similar = {a: {b: float(kernel_similarity(k, m, self.unbiased)) for b, m in kernels.items()}
                       for a, k in kernels.items()}  # fmt: skip
            row["layers"][domain] = similar
            row["start"][domain] = {
                layer: float(kernel_similarity(k, start[layer].double(), self.unbiased)) for layer, k in kernels.items()
            }
            row["explained"][domain] = {a: float(explained_by(activations[a], activations[""])) for a in kernels}
            if domain != target:
                row["covariance"][domain] = {
                    a: float(covariance_similarity(activations[a], seen[target][a])) for a in kernels
                }
        return row

    # --------------------------------------------------------------------------------------------- hooks

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the representation that training starts from; a resumed run remembers the first start's."""
        if not trainer.is_global_zero:
            return
        names = {d: sorted(self._modules(pl_module)) for d in [*pl_module.source_names, pl_module.target_name]}
        if self.start:
            if {d: sorted(layers) for d, layers in self.start.items()} != names:
                raise UDAError(
                    "RepresentationSimilarity: the checkpoint holds other domains or layers; keep layers as they were."
                )
            return
        seen = self.look(trainer, pl_module)
        self.start = {d: {layer: k.float() for layer, k in self.kernels(a).items()} for d, a in seen.items()}
        self._record(trainer, pl_module, seen, epoch=-1)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare and log."""
        if trainer.is_global_zero and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            row = self._record(trainer, pl_module, self.look(trainer, pl_module), trainer.current_epoch)
            values = {
                f"{shown}/{domain}/{layer}": value
                for shown, kind in (("similarity", "start"), ("covariance", "covariance"))
                for domain, found in row[kind].items()
                for layer, value in found.items()
                if math.isfinite(value)
            }
            pl_module.log_dict(values, rank_zero_only=True)

    def _record(self, trainer: L.Trainer, model: Any, seen: dict[str, dict[str, Tensor]], epoch: int) -> dict[str, Any]:
        row = {"epoch": epoch, "step": trainer.global_step, **self.compare(seen, model.target_name)}
        self.rows.append(row)
        if self.file:
            path = Path(trainer.default_root_dir) / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            partial.write_text(json.dumps(_finite(self.rows), indent=1) + "\n")
            partial.replace(path)
        return row

    def state_dict(self) -> dict[str, Any]:
        """The start's kernels and what was found so far."""
        return {"start": self.start, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the first start's kernels."""
        self.start, self.rows = state_dict["start"], state_dict["rows"]


def _finite(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
