"""Tables inside documents: made from a ledger between two markers, and checked to be just that."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from uda.errors import UDAError

_BLOCK = re.compile(r"(<!-- uda-bench: (?P<words>.*?) -->\n)(?P<text>.*?)(<!-- /uda-bench -->)", re.DOTALL)
_OPEN = re.compile(r"<!--\s*uda-bench:")

#: Makes the text of a table from the words of a marker; paths are relative to the folder.
Make = Callable[[list[str], Path], str]


def documents(paths: Iterable[str | Path]) -> list[Path]:
    """Markdown files: those named, and all below the folders named.

    Raises:
        UDAError: there is no such path.
    """
    out: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UDAError(f"no file or folder {str(path)!r}.")
        out += sorted(path.rglob("*.md")) if path.is_dir() else [path]
    return out


def remade(document: Path, make: Make) -> tuple[str, str, int]:
    """Text of a document as it is, as it would be with all tables made anew, and the number of tables.

    Raises:
        UDAError: a marker that is not closed, or one whose table cannot be made.
    """
    old = document.read_text()
    blocks = list(_BLOCK.finditer(old))
    opened = [m for m in _OPEN.finditer(old) if not _in_code(old, m.start())]
    blocks = [b for b in blocks if not _in_code(old, b.start())]
    if len(opened) != len(blocks):
        raise UDAError(
            f"{document}: {len(opened)} markers `<!-- uda-bench: LEDGER ... -->`, but {len(blocks)} tables "
            "that end with `<!-- /uda-bench -->`."
        )
    out, end = [], 0
    for block in blocks:
        try:
            text = make(shlex.split(block["words"]), document.parent)
        except (UDAError, SystemExit) as error:
            raise UDAError(f"{document}: {block['words']}: {error}") from error
        out += [old[end : block.start()], block[1], "\n", text, "\n", block[4]]
        end = block.end()
    return old, "".join([*out, old[end:]]), len(blocks)


def _in_code(text: str, position: int) -> bool:
    """Whether a position is inside a fenced block, where markers are examples."""
    return len(re.findall(r"^```", text[:position], re.MULTILINE)) % 2 == 1 or text[:position].endswith("`")


def check(paths: Iterable[str | Path], make: Make) -> tuple[int, list[str]]:
    """Make every table anew.

    Returns:
        The number of tables, and a difference for each document that does not say what its ledgers say.
    """
    count, differences = 0, []
    for document in documents(paths):
        old, new, tables = remade(document, make)
        count += tables
        if old != new:
            lines = difflib.unified_diff(
                old.splitlines(),
                new.splitlines(),
                f"{document}",
                f"{document} from the ledger",
                lineterm="",
                n=0,
            )
            differences.append("\n".join(lines))
    return count, differences


def update(paths: Iterable[str | Path], make: Make) -> list[Path]:
    """Rewrite the tables; the documents that changed."""
    changed = []
    for document in documents(paths):
        old, new, _ = remade(document, make)
        if old != new:
            document.write_text(new)
            changed.append(document)
    return changed
