"""Texts by domain: files of a text and its label a line, and rows of hashed words made of them."""

from __future__ import annotations

import glob
import gzip
import json
import os
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from uda.data.domains import DomainData, TensorInputs
from uda.data.readers import Reader, labels_by_name, natural_order
from uda.errors import UDAError

_FIELD = "{domain}"


class TextLines(Reader):
    """One file a domain, a JSON object a line with a text and its label; how a text becomes a row is the subclass's.

    ``reviews/{domain}.jsonl.gz`` finds the domains by their files. A domain none of whose lines has the label is
    unlabelled.

    Args:
        path: a .jsonl or .jsonl.gz file; ``{domain}`` stands for the domain's name.
        text_key: key of the text; label_key: key of the label, text or a number.
    """

    def __init__(self, path: str, text_key: str = "text", label_key: str = "label") -> None:
        self.path = os.path.expanduser(str(path))
        if _FIELD not in self.path:
            raise UDAError(
                f"{type(self).__name__}: put {_FIELD} into path, which stands for the domain's name; got {path!r}."
            )
        self.text_key, self.label_key = text_key, label_key

    @abstractmethod
    def rows(self, texts: Sequence[str], file: str) -> np.ndarray:
        """Features ``[N, F]`` float32 of the texts of a file."""

    def domains(self) -> list[str]:
        """Names of the domains."""
        before, _, after = self.path.partition(_FIELD)
        files = glob.glob(glob.escape(before) + "*" + glob.escape(after))
        return natural_order(f[len(before) : len(f) - len(after)] for f in files)

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, f"{self.path!r}")
        path = self.path.replace(_FIELD, domain)
        texts, labels = self._lines(path)
        if missing := [i for i, label in enumerate(labels) if label is None]:
            if len(missing) < len(labels):
                raise UDAError(
                    f"{path!r}: {len(missing)} of {len(labels)} texts have no {self.label_key!r}, the first is text "
                    f"{missing[0] + 1}. Give all of them one, or none for an unlabelled domain."
                )
            y, names = None, []
        else:
            y, names = labels_by_name([str(label) for label in labels])
        return DomainData(domain, TensorInputs(torch.from_numpy(self.rows(texts, path)), "features"), y, names)

    def _lines(self, path: str) -> tuple[list[str], list[Any]]:
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
        return texts, labels


def hashed_words(texts: Sequence[str], width: int = 2048, bigrams: bool = True) -> np.ndarray:
    """Rows of length 1, ``[N, width]`` float32: counts of words, each in a column of its own hash (scikit-learn's).

    Words are lower-case runs of two or more letters or digits; ``bigrams``: pairs of neighbours as well. A hash gives
    the column and a sign, so that words that share a column cancel out on average (Weinberger et al., ICML 2009).
    Nothing is fitted: no text of one domain has a part in the rows of another.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(n_features=width, ngram_range=(1, 2 if bigrams else 1), dtype=np.float32)
    return words.transform(texts).toarray()


class Texts(TextLines):
    """Texts as rows of :func:`hashed_words`, without encoder or download; an encoder's: :class:`~uda.data.Sentences`.

    Args:
        path: a .jsonl or .jsonl.gz file; ``{domain}`` stands for the domain's name.
        text_key: key of the text; label_key: key of the label, text or a number.
        width: columns; bigrams: pairs of neighbouring words as well.
    """

    def __init__(
        self, path: str, text_key: str = "text", label_key: str = "label", width: int = 2048, bigrams: bool = True
    ) -> None:
        super().__init__(path, text_key, label_key)
        if width < 1:
            raise UDAError(f"Texts: width must be positive, not {width}.")
        self.width, self.bigrams = width, bigrams

    def rows(self, texts: Sequence[str], file: str) -> np.ndarray:
        """Hashed words ``[N, width]``."""
        return hashed_words(texts, self.width, self.bigrams)
