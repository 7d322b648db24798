"""Classical adaptation by optimal transport inside a training: whole domains, once an epoch."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.errors import check_choice
from uda.losses import classification_loss
from uda.passes import Pools
from uda.weighted import Weighted
from uda_transport.classical import METHODS, NORMS, transport

LEARN = ("moved_source", "labelled_target")


class OTDA(Weighted):
    """Move the source onto the target by optimal transport, and train the classifier where it arrives.

    At the start of each epoch the features of both domains are transported by a method of ``ot.da``: see
    :func:`~uda_transport.classical.transport`. What results is kept, ``rows`` of features ``[R, F]`` with ``labels``
    ``[R, C]``, and in each step the classifier is trained on a random batch of it:

        ``L = L_cls + weight * ramp(p) * CE(head(rows_b), labels_b)``

    The rows are constants: this objective trains the classifier, and the source's own trains the network. Inference is
    the classifier's, so samples that were never transported are served.

    Args:
        method: ``emd``, ``sinkhorn``, ``group_lasso``, ``group_lasso_l2``, ``linear``, ``mapping``, or ``jcpot`` for
            several sources whose class shares differ from the target's.
        weight: of the objective; ramp: its growth over the run.
        learn: ``moved_source``, source samples where they arrive, with their labels; ``labelled_target``, target
            samples with the labels of the mass that they receive (not for ``linear``).
        reg: of the entropy, in units of the normalised cost.
        reg_class: of the group lasso.
        norm: what costs are divided by: ``median``, ``max``, or null.
        max_samples: most samples a domain that a transport takes. Of larger domains a random subset is drawn in each
            epoch: time grows with the product of both (exact transport: with the cube), and the plan takes
            ``8 max_samples^2`` bytes, some times over.
        batch_size: rows in a step.
    """

    settings = ("closed", "multi-source")
    search_space: ClassVar[dict[str, Any]] = {
        "method": ["emd", "sinkhorn", "group_lasso", "linear"], "weight": (0.1, 10.0, "log"), "reg": (0.01, 0.5, "log"),
    }  # fmt: skip
    rows: Tensor
    labels: Tensor
    count: Tensor

    def __init__(
        self,
        method: str = "group_lasso",
        weight: float = 1.0,
        learn: str = "moved_source",
        reg: float = 0.05,
        reg_class: float = 0.1,
        norm: str | None = "median",
        max_samples: int = 1000,
        batch_size: int = 64,
        ramp: str = "none",
    ) -> None:
        super().__init__(weight, ramp)
        check_choice("OTDA", "method", method, METHODS)
        check_choice("OTDA", "learn", learn, LEARN)
        if norm not in NORMS:
            raise uda.UDAError(f"OTDA: norm is median, max or null, not {norm!r}.")
        if reg <= 0 or reg_class < 0 or max_samples < 2 or batch_size < 1:
            raise uda.UDAError(
                "OTDA: reg must be positive, reg_class not negative, max_samples 2 or more and batch_size 1 or more."
            )
        if method == "linear" and learn == "labelled_target":
            raise uda.UDAError("OTDA: linear transport has no plan that labels could follow: use learn: moved_source.")
        self.method, self.learn, self.reg, self.reg_class, self.norm = method, learn, reg, reg_class, norm
        self.max_samples, self.batch_size = max_samples, batch_size

    @uda.hookimpl
    def data_needs(self) -> uda.DataNeeds:
        """Both domains at the start of each epoch."""
        return uda.DataNeeds(refresh={"source", "target"})

    @uda.hookimpl
    def build(self, model: uda.UDA) -> None:
        """Room for the rows; ``count`` of them are filled."""
        if "rows" in self._buffers:
            return
        names = [model.target_name] if self.learn == "labelled_target" else model.source_names
        size = sum(min(self.max_samples, model.sizes.get(name, 0)) for name in names)
        self.register_buffer("rows", torch.zeros(max(size, 1), model.feature_dim))
        self.register_buffer("labels", torch.zeros(max(size, 1), model.num_classes))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @uda.hookimpl
    def refresh(self, model: uda.UDA, bank: Pools) -> None:
        """Transport the domains as the network sees them now."""
        pools = [self._subset(p.features, p.y) for p in bank.sources.values()]
        target, _ = self._subset(bank.target.features)
        moved = transport(
            [x for x, _ in pools], [y for _, y in pools], target, self.method, self.reg, self.reg_class, self.norm,
            model.num_classes,
        )  # fmt: skip
        if self.learn == "labelled_target":
            known = moved.target_probs.sum(1) > 0
            rows, labels = target[known], moved.target_probs[known]
        else:
            y = np.concatenate([y for _, y in pools])
            rows, labels = np.concatenate(moved.sources), np.eye(model.num_classes)[y]
        self.rows[: len(rows)] = torch.from_numpy(rows).to(self.rows)
        self.labels[: len(rows)] = torch.from_numpy(labels).to(self.labels)
        self.count.fill_(len(rows))

    def _subset(self, features: Tensor, y: Tensor | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """At most ``max_samples`` rows as numpy; the draw is seeded alike on all processes."""
        if len(features) > self.max_samples:
            chosen = torch.randperm(len(features))
            if self.method == "jcpot" and y is not None:  # which needs each class in each source
                _, first = np.unique(y.cpu().numpy()[chosen.numpy()], return_index=True)
                chosen = torch.cat([chosen[first], chosen[np.setdiff1d(np.arange(len(chosen)), first)]])
            chosen = chosen[: self.max_samples].to(features.device)
            features, y = features[chosen], None if y is None else y[chosen]
        return features.double().cpu().numpy(), None if y is None else y.cpu().numpy()

    @uda.hookimpl
    def refine_classifier(self, step: uda.Step) -> dict[str, Tensor]:
        """Classification of a batch of the rows."""
        device = self.rows.device
        draw = (torch.rand(self.batch_size, device=device) * self.count).long().clamp_max(len(self.rows) - 1)
        rows, labels = self.rows[draw], F.normalize(self.labels[draw], p=1, dim=1)
        return {"transported": self.scaled(step, classification_loss(step.model.head(rows), labels))}
