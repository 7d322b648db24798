"""Who answers queries for labels: a person by way of a file, or a file of labels that stands in for one."""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from uda.described import Described
from uda.errors import UDAError, nearest

COLUMNS = ("id", "round", "label")


class LabelsWanted(UDAError):
    """A run stops here: samples wait for a person's labels."""


class Oracle(Described, ABC):
    """Gives labels of the samples that a method asks for, and of no others. One process of a run talks to it."""

    @abstractmethod
    def answer(self, ids: Sequence[str], turn: int, class_names: Sequence[str]) -> dict[str, str]:
        """Class name or class id, as text, by sample id.

        Args:
            ids: of the samples (path or row number); turn: number of the round, from 0; class_names: in id order.

        Raises:
            UDAError: no answer.
        """

    def asked(self, turn: int) -> list[str] | None:
        """Ids that round ``turn`` has asked for before, in a run that was stopped; None if it has not."""
        return None


class SimulatedOracle(Oracle):
    """For benchmarks: answers from a file of labels, by the ids that are asked for. It keeps no other label.

    Args:
        labels: CSV with the columns ``id`` and ``label`` (name or number of the class).
    """

    def __init__(self, labels: str) -> None:
        self.labels = str(labels)

    def answer(self, ids: Sequence[str], turn: int, class_names: Sequence[str]) -> dict[str, str]:
        """The file's labels of ``ids``."""
        wanted = set(ids)
        found = _labels([row for row in _rows(self.labels, ("id", "label")) if row["id"] in wanted], self.labels)
        if lacking := [i for i in ids if not found.get(i)]:
            raise UDAError(f"SimulatedOracle: {self.labels} lacks labels: {len(lacking)}, {lacking[0]!r} first.")
        return found


class People(Oracle):
    """Queries go to a CSV file, and the run stops; somebody fills in the labels, and the run is started again.

    Rows of later rounds are added below. A run that finds its round answered goes on without a stop.

    Args:
        file: CSV with the columns ``id``, ``round``, ``label`` (name or number of the class); made where it is missing.
    """

    def __init__(self, file: str = "queries.csv") -> None:
        self.file = str(file)

    def _round(self, turn: int) -> dict[str, str]:
        if not Path(self.file).exists():
            return {}
        rows = [row for row in _rows(self.file, COLUMNS) if row["id"].strip()]
        for row in rows:
            if _whole(row["round"]) is None:
                raise UDAError(f"Oracle: {self.file} has round {row['round']!r} for {row['id']!r}: leave its number.")
        return _labels([row for row in rows if _whole(row["round"]) == turn], self.file)

    def asked(self, turn: int) -> list[str] | None:
        """Ids in the file's rows of this round."""
        return list(self._round(turn)) or None

    def answer(self, ids: Sequence[str], turn: int, class_names: Sequence[str]) -> dict[str, str]:
        """The file's labels of this round; where some lack, the rows are written and the run stops.

        Raises:
            LabelsWanted: labels lack.
        """
        found, path = self._round(turn), Path(self.file)
        if missing := [i for i in ids if i not in found]:
            path.parent.mkdir(parents=True, exist_ok=True)
            before = path.read_bytes() if path.exists() else b""
            with path.open("a", newline="", encoding="utf-8") as out:
                writer = csv.writer(out)
                if not before:
                    writer.writerow(COLUMNS)
                elif not before.endswith(b"\n"):  # as some editors leave it
                    out.write("\r\n")
                writer.writerows((i, turn, "") for i in missing)
        if lacking := [i for i in ids if not found.get(i)]:
            raise LabelsWanted(
                f"{len(lacking)} samples wait for labels in {path} (round {turn}): fill in the column 'label' with "
                f"one of {', '.join(list(class_names)[:8])}{', ...' if len(class_names) > 8 else ''}, and start the "
                "same command again (or resume with --ckpt_path)."
            )
        return {i: found[i] for i in ids}


def _rows(file: str, columns: Sequence[str]) -> list[dict[str, str]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise UDAError(f"Oracle: no file {file!r}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as text:
            reader = csv.DictReader(text)
            if lacking := [c for c in columns if c not in (reader.fieldnames or [])]:
                raise UDAError(
                    f"Oracle: {file} has no column {lacking[0]!r}; it needs {', '.join(columns)}, separated by commas."
                )
            return [{c: row[c] or "" for c in columns} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UDAError(f"Oracle: {file} cannot be read as CSV in UTF-8: {error}") from error


def _whole(text: str) -> int | None:
    """The number of a cell, as spreadsheets write whole numbers: ``3`` or ``3.0``."""
    number, _, zeros = text.strip().partition(".")
    return int(number) if number.isascii() and number.isdecimal() and not zeros.strip("0") else None


def _labels(rows: Sequence[dict[str, str]], file: str) -> dict[str, str]:
    """Label of each id in order, empty where it has none."""
    found: dict[str, str] = {}
    for row in rows:
        text, before = row["label"].strip(), found.get(row["id"], "")
        if before and text and text != before:
            raise UDAError(f"Oracle: {file} gives sample {row['id']!r} two labels, {before!r} and {text!r}: keep one.")
        found[row["id"]] = before or text
    return found


def class_ids(answers: dict[str, str], ids: Sequence[str], class_names: Sequence[str], who: str) -> list[int]:
    """Class ids of ``ids`` from names or numbers. A class name wins over a number.

    Raises:
        UDAError: an answer that is neither.
    """
    position = {name: i for i, name in enumerate(class_names)}
    out = []
    for i in ids:
        text = answers[i]
        if text in position:
            out.append(position[text])
        elif (number := _whole(text)) is not None and number < len(class_names):
            out.append(number)
        else:
            raise UDAError(f"{who}: label {text!r} of sample {i!r} is no class. {nearest(text, class_names)}")
    return out


ORACLES: dict[str, type[Oracle]] = {"SimulatedOracle": SimulatedOracle, "People": People}


def make_oracle(spec: Oracle | dict | None) -> Oracle:
    """An oracle from an object, or from ``{class_path, init_args}`` with one of the two names here or a dotted path.

    Raises:
        UDAError: none is given, or what is given is none. There is no default: nobody gets labels by accident.
    """
    if isinstance(spec, Oracle):
        return spec
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UDAError(
            "LFTL: oracle is missing: say who labels the queried samples, as {class_path: People, init_args: {file: "
            "queries.csv}} or, in a benchmark, {class_path: SimulatedOracle, init_args: {labels: labels.csv}}."
        )
    path, arguments = spec["class_path"], dict(spec.get("init_args") or {})
    cls = ORACLES.get(path.rpartition(".")[2] if path.startswith("uda_sourcefree.") else path)
    if cls is None and "." in path:
        import importlib

        module, _, name = path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UDAError(f"LFTL: oracle {path!r} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, Oracle)):
        raise UDAError(f"LFTL: {path!r} is no oracle. {nearest(path, ORACLES)}")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise UDAError(f"LFTL: oracle {path}: {error}") from error
