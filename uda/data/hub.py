"""Data sets of images from the Hugging Face hub, unpacked into folders. Needs the extra ``hub``."""

from __future__ import annotations

import glob
import io
import json
import os
from typing import Any

from uda.errors import UDAError

_EXTRA = "install the extra: pip install 'uda-lightning[hub]'"
_BATCH = 256


def fetch(repository: str) -> str:
    """Path of a local snapshot of a data set; what was fetched before is not fetched again.

    Raises:
        UDAError: huggingface_hub is not installed, or the hub cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError as e:
        raise UDAError(f"downloading needs the package huggingface_hub; {_EXTRA}") from e
    try:
        return snapshot_download(repository, repo_type="dataset", allow_patterns=["*.parquet", "*.md"])
    except Exception as e:  # network, access and disk errors come in many classes
        raise UDAError(
            f"cannot download {repository!r} from the Hugging Face hub ({type(e).__name__}: {e}); check "
            f"the network, "
            "or copy the data by hand"
        ) from e


def unpack(snapshot: str, root: str) -> int:
    """Write the images of a snapshot's Parquet files to ``root/<domain>/<class>/<number>``; gives their
    number.

    Args:
        snapshot: folder with Parquet files of the columns ``image``, ``domain`` and ``label``; the latter two
            text, or numbers whose names the file's metadata gives.
        root: created if missing.

    Raises:
        UDAError: pyarrow is not installed, no Parquet file, or other columns.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as e:
        raise UDAError(f"unpacking needs the package pyarrow; {_EXTRA}") from e
    files = sorted(glob.glob(os.path.join(snapshot, "**", "*.parquet"), recursive=True))
    if not files:
        raise UDAError(f"{snapshot!r} holds no Parquet files")
    number = 0
    for file in files:
        table = pq.ParquetFile(file)
        missing = {"image", "domain", "label"} - set(table.schema_arrow.names)
        if missing:
            raise UDAError(
                f"{file!r} has columns {table.schema_arrow.names}, but not {sorted(missing)}; this is "
                f"another data set"
            )
        names = _class_names(table.schema_arrow.metadata)
        for batch in table.iter_batches(_BATCH, columns=["image", "domain", "label"]):
            for row in batch.to_pylist():
                domain, label = (_text(row[k], names.get(k)) for k in ("domain", "label"))
                _write(os.path.join(root, domain, label), number, row["image"]["bytes"])
                number += 1
    return number


def _class_names(metadata: dict[bytes, bytes] | None) -> dict[str, list[str]]:
    info = json.loads((metadata or {}).get(b"huggingface", b"{}"))
    features = info.get("info", {}).get("features", {})
    return {k: f["names"] for k, f in features.items() if isinstance(f, dict) and "names" in f}


def _text(value: Any, names: list[str] | None) -> str:
    text = names[value] if names is not None and isinstance(value, int) else str(value)
    return text.replace(os.sep, "_").strip(". ") or "_"


def _write(folder: str, number: int, content: bytes) -> None:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        ending = {"JPEG": "jpg"}.get(image.format or "", (image.format or "img").lower())
    path = os.path.join(folder, f"{number:06d}.{ending}")
    if os.path.exists(path) and os.path.getsize(path) == len(content):
        return
    os.makedirs(folder, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
