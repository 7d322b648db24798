"""Metrics that are functions of the confusion matrix ``[C + 1, C + 1]``, row = truth, whose last class is unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from uda.errors import UDAError

Average = Literal["class", "instance"]


def confusion_matrix(label: Tensor, y: Tensor, num_classes: int, unknown: Tensor | None = None) -> Tensor:
    """Counts ``[C + 1, C + 1]``, int64, row = truth.

    Args:
        label: predictions ``[N]``; ``num_classes`` and above are unknown.
        y: truth ``[N]``; ``num_classes`` and above are target-private classes; negative ones are left out.
        num_classes: C, the classes of the source.
        unknown: mask ``[N]`` of the samples that are rejected, or None.
    """
    if unknown is not None:
        label = torch.where(unknown, num_classes, label)
    rows = y >= 0
    flat = y[rows].clamp(max=num_classes) * (num_classes + 1) + label[rows].clamp(max=num_classes)
    return torch.bincount(flat, minlength=(num_classes + 1) ** 2).reshape(num_classes + 1, num_classes + 1)


def recalls(confusion: Tensor) -> Tensor:
    """Share of each true class that is predicted as itself ``[C + 1]``, float64; NaN for one that does not occur."""
    return confusion.diagonal().double() / confusion.sum(1).double()


def _average(confusion: Tensor, rows: slice, average: Average) -> Tensor:
    if average == "class":
        return recalls(confusion)[rows].nanmean()
    if average != "instance":
        raise UDAError(f"average is {average!r}; it must be class or instance")
    return confusion.diagonal()[rows].sum().double() / confusion[rows].sum().double()


def accuracy(confusion: Tensor, average: Average = "instance") -> Tensor:
    """Accuracy over all samples, or mean over the classes that occur; unknown is a class like the others."""
    return _average(confusion, slice(None), average)


def known_accuracy(confusion: Tensor, average: Average = "class") -> Tensor:
    """Accuracy on samples of known classes, a rejected one is wrong: OS* for ``class`` (Panareda Busto, Gall 2017)."""
    return _average(confusion, slice(0, -1), average)


def unk(confusion: Tensor) -> Tensor:
    """Share of the samples of target-private classes that are rejected (UNK; Saito et al. 2018)."""
    return recalls(confusion)[-1]


def os(confusion: Tensor) -> Tensor:
    """Mean recall over the known classes and unknown as one more (OS; Panareda Busto, Gall 2017; Saito et al. 2018)."""
    return accuracy(confusion, "class")


def harmonic_mean(*values: Tensor) -> Tensor:
    """``n / sum(1 / v)``; 0 where any is 0, NaN where any is NaN."""
    stacked = torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    mean = len(values) / (1 / stacked).sum()
    return torch.where(stacked.isnan().any(), torch.nan, mean)


def h_score(confusion: Tensor, average: Average = "class") -> Tensor:
    """``2 a u / (a + u)`` of the accuracy on known classes ``a`` and UNK ``u``.

    Fu et al. (CMU, ECCV 2020) introduced it with instance accuracies; ``class`` is the HOS of Bucci et al. (ROS, ECCV
    2020), and what OVANet, UniOT, GLC and LEAD report as H-score.
    """
    return harmonic_mean(known_accuracy(confusion, average), unk(confusion))


def h3_score(confusion: Tensor, nmi: Tensor, average: Average = "class") -> Tensor:
    """``3 / (1/a + 1/u + 1/nmi)``: with the clusters of target-private classes (Chang et al., UniOT, NeurIPS 2022)."""
    return harmonic_mean(known_accuracy(confusion, average), unk(confusion), nmi)


def partial_accuracy(confusion: Tensor) -> Tensor:
    """Instance accuracy on samples of known classes, the figure of partial adaptation (Cao et al., PADA, ECCV 2018)."""
    return known_accuracy(confusion, "instance")


def outlier_share(confusion: Tensor) -> Tensor:
    """Share of the samples of known classes that are taken for a class of the source that the target lacks.

    What negative transfer does in partial adaptation (the outlier classes of Cao et al. 2018); rejection is none.
    """
    absent = confusion[:-1].sum(1) == 0
    return confusion[:-1, :-1][:, absent].sum().double() / confusion[:-1].sum().double()


class ConfusionMetric(Metric):
    """The confusion matrix, and in subclasses a function of it, as a metric; its state adds over batches and ranks.

    Args:
        num_classes: C, the classes of the source.
    """

    higher_is_better = True
    full_state_update = False
    of: ClassVar[Callable[..., Tensor]] = staticmethod(lambda confusion: confusion)
    confusion: Tensor

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        shape = (num_classes + 1, num_classes + 1)
        self.add_state("confusion", torch.zeros(shape, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, label: Tensor, y: Tensor, unknown: Tensor | None = None) -> None:
        """Take in predictions; arguments as in :func:`confusion_matrix`."""
        self.confusion = self.confusion + confusion_matrix(label, y, self.num_classes, unknown)

    def compute(self) -> Tensor:
        """A scalar in [0, 1], NaN where the classes that it is about do not occur."""
        return type(self).of(self.confusion)


class _Averaged(ConfusionMetric):
    def __init__(self, num_classes: int, average: Average | None = None, **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.options = {} if average is None else {"average": average}

    def compute(self) -> Tensor:
        return type(self).of(self.confusion, **self.options)


class Accuracy(_Averaged):
    """:func:`accuracy`; ``average``: ``instance`` or ``class``."""

    of = staticmethod(accuracy)


class OSStar(_Averaged):
    """:func:`known_accuracy`; ``average``: ``class`` or ``instance``."""

    of = staticmethod(known_accuracy)


class UNK(ConfusionMetric):
    """:func:`unk`."""

    of = staticmethod(unk)


class OS(ConfusionMetric):
    """:func:`os`."""

    of = staticmethod(os)


class HScore(_Averaged):
    """:func:`h_score`; ``average``: ``class`` or ``instance``."""

    of = staticmethod(h_score)


class PartialAccuracy(ConfusionMetric):
    """:func:`partial_accuracy`."""

    of = staticmethod(partial_accuracy)


class OutlierShare(ConfusionMetric):
    """:func:`outlier_share`."""

    of = staticmethod(outlier_share)
    higher_is_better = False
