"""KTF's discrepancy as a plugin: means of domains and classes, for few labelled target samples."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

import uda
from uda.nn import full, no_autocast
from uda.weighted import Weighted
from uda_transport.ktf import mean_discrepancy


class KTF(Weighted):
    """Draw means of domains and of classes together (Yao et al., 2025), across feature spaces if need be.

    ``weight * (|m_s - m_t|^2 + sum_c |m_s^c - m_t^c|^2) / (C + 1)`` of the features of a batch, each divided by its
    length. The class means of the target are weighed by its class probabilities, and by its labels where
    ``data.labelled_target`` gives some; gradients pass through the probabilities. Domains of different shapes need
    ``data.heterogeneous: true`` and a backbone for each. The paper's classifier alone, full batch, is
    :class:`~uda_transport.ktf.KTFClassifier`.

    Args:
        weight: the authors' ``mu``: 0.1 for texts, 1.0 for photographs; ramp: its growth over the run.
    """

    settings = ("closed", "multi-source", "heterogeneous", "semi-supervised")
    search_space: ClassVar[dict[str, Any]] = {"weight": (0.03, 3.0, "log")}

    def __init__(self, weight: float = 0.1, ramp: str = "none") -> None:
        super().__init__(weight, ramp)

    @uda.hookimpl
    def align_features(self, step: uda.Step) -> dict[str, Tensor]:
        """The discrepancy of the pooled sources and the target."""
        target, probs = [step.target.features], [step.target.logits]
        with no_autocast(target[0]):
            probs = [full(probs[0]).softmax(1)]
            if (few := step.labelled) is not None:
                target.append(few.features)
                probs.append(F.one_hot(few.y, probs[0].shape[1]).to(probs[0]))
            z_s, z_t = (F.normalize(full(z)) for z in (step.pooled("features"), torch.cat(target)))
            return {"means": self.scaled(step, mean_discrepancy(z_s, step.pooled("y"), z_t, torch.cat(probs)))}
