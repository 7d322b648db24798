"""A domain in two: one part to train on, another that the model has not seen."""

from __future__ import annotations

import numpy as np
import torch

from uda.data.domains import DomainData
from uda.data.readers import Reader
from uda.data.splits import split_by_index
from uda.errors import UDAError


class Halves(Reader):
    """Each domain of another reader in two, ``<domain>_train`` and ``<domain>_test``.

    For data sets of one domain, whose other domains are corruptions of images that the model has not seen. No label
    takes part in the draw: both halves have all classes where there are enough rows.

    Args:
        reader: of the whole domains.
        share: of the rows in ``_train``, above 0 and below 1.
        seed: of the draw.
    """

    def __init__(self, reader: Reader, share: float = 0.5, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise UDAError(f"Halves: share lies between 0 and 1, not {share}.")
        self.reader, self.share, self.seed = reader, share, seed

    def domains(self) -> list[str]:
        """Two names a domain."""
        return [f"{d}_{half}" for d in self.reader.domains() for half in ("train", "test")]

    def read(self, domain: str) -> DomainData:
        """Read one half.

        Raises:
            UDAError: unknown, or the whole domain has a single row.
        """
        self._known(domain, "Halves")
        name, _, half = domain.rpartition("_")
        whole = self.reader.read(name)
        if len(whole) < 2:
            raise UDAError(f"Halves: domain {name!r} has a single row, which cannot be divided.")
        train, test = split_by_index(len(whole), 1 - self.share, self.seed, name, "halves")
        order = whole.inputs.order()  # files in class folders: which row goes where must not depend on labels
        rows = np.sort((np.arange(len(whole)) if order is None else order)[train if half == "train" else test])
        labels = None if whole.labels is None else whole.labels[torch.from_numpy(rows)]
        return DomainData(
            domain, whole.inputs.take(rows), labels, whole.class_names, [whole.row_id(i) for i in rows.tolist()],
            whole.multi_label,
        )  # fmt: skip
