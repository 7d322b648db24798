"""Texts by domain, as rows of hashed words."""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch

from uda.data.domains import DomainData, TensorInputs
from uda.data.readers import Reader, labels_by_name, natural_order
from uda.errors import UDAError

_FIELD = "{domain}"
_WORD = re.compile(r"\w\w+")


def hashed_words(texts: Sequence[str], width: int = 2048, bigrams: bool = True) -> np.ndarray:
    """Rows of length 1, ``[N, width]`` float32: ``1 + log`` of a word's count, each in a column of its own hash.

    Words are lower-case runs of two or more letters or digits; ``bigrams``: pairs of neighbours as well. A hash gives
    the column and a sign, so that words that share a column cancel out on average (Weinberger et al., ICML 2009).
    Nothing is fitted: no text of one domain has a part in the rows of another.
    """
    rows = np.zeros((len(texts), width), dtype=np.float32)
    places: dict[str, tuple[int, int]] = {}
    for row, text in zip(rows, texts, strict=True):
        words = _WORD.findall(text.lower())
        if bigrams:
            words += [f"{a} {b}" for a, b in itertools.pairwise(words)]
        counts: dict[str, int] = {}
        for word in words:
            counts[word] = counts.get(word, 0) + 1
        for word, n in counts.items():
            if word not in places:
                value = zlib.crc32(word.encode())
                places[word] = (value // 2 % width, 1 if value % 2 else -1)
            column, sign = places[word]
            row[column] += sign * (1 + np.log(n))
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


class Texts(Reader):
    """One file a domain, a JSON object a line with a text and its label; rows of :func:`hashed_words`.

    ``Texts("reviews/{domain}.jsonl.gz")`` finds the domains by their files. A domain none of whose lines has the label
    is unlabelled. For features of a sentence encoder, compute them once and read them with
    :class:`~uda.data.Arrays`.

    Args:
        path: a .jsonl or .jsonl.gz file; ``{domain}`` stands for the domain's name.
        text_key: key of the text; label_key: key of the label, text or a number.
        width: columns; bigrams: pairs of neighbouring words as well.
    """

    def __init__(
        self, path: str, text_key: str = "text", label_key: str = "label", width: int = 2048, bigrams: bool = True
    ) -> None:
        self.path = os.path.expanduser(str(path))
        if _FIELD not in self.path:
            raise UDAError(f"Texts: put {_FIELD} into path, which stands for the domain's name; got {path!r}.")
        if width < 1:
            raise UDAError(f"Texts: width must be positive, not {width}.")
        self.text_key, self.label_key, self.width, self.bigrams = text_key, label_key, width, bigrams

    def domains(self) -> list[str]:
        """Names of the domains."""
        before, _, after = self.path.partition(_FIELD)
        files = glob.glob(glob.escape(before) + "*" + glob.escape(after))
        return natural_order(f[len(before) : len(f) - len(after)] for f in files)

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, f"{self.path!r}")
        path = self.path.replace(_FIELD, domain)
        texts, labels = [], []
        with (gzip.open if path.endswith(".gz") else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    texts.append(str(entry[self.text_key]))
                except (ValueError, TypeError, KeyError) as e:
                    raise UDAError(
                        f"{path!r}, line {number}: no JSON object with the key {self.text_key!r} "
                        f"({type(e).__name__}: {e})."
                    ) from e
                labels.append(entry.get(self.label_key))
        if not texts:
            raise UDAError(f"{path!r} has no texts.")
        if missing := [i for i, label in enumerate(labels) if label is None]:
            if len(missing) < len(labels):
                raise UDAError(
                    f"{path!r}: {len(missing)} of {len(labels)} texts have no {self.label_key!r}, the first is text "
                    f"{missing[0] + 1}. Give all of them one, or none for an unlabelled domain."
                )
            y, names = None, []
        else:
            y, names = labels_by_name([str(label) for label in labels])
        x = torch.from_numpy(hashed_words(texts, self.width, self.bigrams))
        return DomainData(domain, TensorInputs(x, "features"), y, names)
