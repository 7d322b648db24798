"""Any map-style torch dataset as a domain, for use from Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from uda.data.domains import DomainData, Inputs
from uda.data.readers import Reader, labels_by_name
from uda.errors import UDAError


class DatasetInputs(Inputs):
    """The ``x`` of each item; what else an item holds is dropped here."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset = dataset
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise UDAError(
                f"dataset of domain {name!r} must have __len__ and __getitem__ (a map-style dataset)"
            )
        if len(dataset) == 0:
            raise UDAError(f"domain {name!r} is empty: its dataset has length 0")
        x = _first(dataset[0])
        if isinstance(x, Tensor):
            self.kind = "images" if x.dim() == 3 else "features"
        else:
            self.kind = "files"  # PIL images are treated as decoded files

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, rows: Tensor) -> Tensor | list[Any]:
        """Inputs at ``rows`` (int64 [B])."""
        items = [_first(self.dataset[int(r)]) for r in rows]
        if self.kind == "files":
            return items
        batch = torch.stack(items)
        return batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()


def _first(item: Any) -> Any:
    return item[0] if isinstance(item, (tuple, list)) else item


class Datasets(Reader):
    """Domains from torch datasets, by keyword: ``Datasets(source=a, target=b)``, ``Datasets(art=a, clip=b,
    real=c)``.

    An item is ``(x, y)`` or ``x``; x a tensor [C, H, W] or [D] or a PIL image, y a whole number. Labels are
    taken from ``targets``, ``labels`` or a TensorDataset's second tensor where there are any, else by one
    pass over the items. Class names are the dataset's ``classes``, else the numbers.
    """

    def __init__(self, **datasets: Any) -> None:
        self.datasets = datasets

    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.datasets)

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, "Datasets")
        dataset = self.datasets[domain]
        inputs = DatasetInputs(dataset, domain)
        labels = _labels(dataset)
        if labels is None:
            return DomainData(domain, inputs, None, [])
        classes = getattr(dataset, "classes", None)
        if classes is not None and len(labels) and int(labels.max()) < len(classes):
            return DomainData(domain, inputs, torch.from_numpy(labels), [str(c) for c in classes])
        values, inverse = np.unique(labels, return_inverse=True)
        ids, names = labels_by_name([str(int(v)) for v in values])
        return DomainData(domain, inputs, ids[torch.from_numpy(inverse)], names)


def _labels(dataset: Any) -> np.ndarray | None:
    first = dataset[0]
    if not isinstance(first, (tuple, list)) or len(first) < 2:
        return None
    tensors = getattr(dataset, "tensors", None)
    for known in (
        getattr(dataset, "targets", None),
        getattr(dataset, "labels", None),
        tensors and tensors[1],
    ):
        if known is not None and len(known) == len(dataset):
            return np.asarray(known).astype(np.int64)
    return np.array([int(dataset[i][1]) for i in range(len(dataset))], dtype=np.int64)
