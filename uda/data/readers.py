"""Readers: where domains come from. The constructor is cheap; :meth:`Reader.read` does the work."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod

import torch

from uda.data.domains import DomainData, FileInputs
from uda.described import Described
from uda.errors import UDAError, nearest

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif")


class Reader(Described, ABC):
    """A set of named domains.

    To bring data of your own, write :meth:`domains` and :meth:`read`.
    """

    @abstractmethod
    def domains(self) -> list[str]:
        """Names of the domains there are; cheap."""

    @abstractmethod
    def read(self, domain: str) -> DomainData:
        """Read one domain.

        Raises:
            UDAError: when it is unknown, empty or malformed.
        """

    def place(self, domain: str) -> str:
        """Where a domain is looked for, for the message that it is not there: ``no file 'a.npz'``; empty: not known."""
        return ""

    def _known(self, domain: str, where: str) -> None:
        known = self.domains()
        if domain not in known:
            raise UDAError(f"unknown domain {domain!r} in {where}. {nearest(domain, known)}")


def natural_order(names) -> list[str]:
    """Sorted names; by number when every name is a whole number, so that '10' comes after '2'."""
    names = set(names)
    return sorted(names, key=int) if all(n.isdecimal() for n in names) else sorted(names)


def labels_by_name(names: list[str]) -> tuple[torch.Tensor, list[str]]:
    """Ids int64 [N] and the class names that they point into, from a class name for each row."""
    classes = natural_order(names)
    position = {name: i for i, name in enumerate(classes)}
    return torch.tensor([position[n] for n in names], dtype=torch.int64), classes


class ImageFolders(Reader):
    """Images in ``root/domain/class/``; sub-folders of a class are searched too.

    A domain folder with images directly inside is an unlabelled domain (it can be a target only).

    Args:
        root: folder of the domain folders.
        subfolder: between a domain's folder and its class folders (``images`` in the original Office-31).
    """

    def __init__(self, root: str, subfolder: str = "") -> None:
        self.root, self.subfolder = os.path.expanduser(str(root)), subfolder

    def domains(self) -> list[str]:
        """Names of the domains."""
        if not os.path.isdir(self.root):
            raise UDAError(f"image folder root {self.root!r} does not exist or is no folder")
        with os.scandir(self.root) as entries:
            return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))

    def place(self, domain: str) -> str:
        """The folder that is not there."""
        return f"no folder {os.path.join(self.root, domain)!r}"

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, f"folder {self.root!r}")
        folder = os.path.normpath(os.path.join(self.root, domain, self.subfolder))
        if not os.path.isdir(folder):
            raise UDAError(f"domain {domain!r} has no folder {folder!r}; check subfolder")
        flat, classes = [], []
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda e: e.name):
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    classes.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_ENDINGS):
                    flat.append(entry.path)
        by_class = {c: _images_below(os.path.join(folder, c)) for c in classes}
        empty = [c for c, found in by_class.items() if not found]
        if flat and any(by_class.values()):
            raise UDAError(
                f"domain folder {folder!r} has images directly inside and in class folders; "
                "move them into class folders, or all of them directly inside for an unlabelled target"
            )
        if not flat and len(empty) == len(classes):
            raise UDAError(
                f"domain folder {folder!r} holds no images; expected {folder}/<class>/<image> with one of "
                f"{', '.join(IMAGE_ENDINGS)}"
            )
        if flat:
            return DomainData(domain, FileInputs(flat, by_content=True), None, [], flat)
        found = natural_order(c for c in classes if by_class[c])
        paths = [p for c in found for p in by_class[c]]
        counts = torch.tensor([len(by_class[c]) for c in found])
        return DomainData(
            domain,
            FileInputs(paths, by_content=True),
            torch.arange(len(found)).repeat_interleave(counts),
            found,
            paths,
        )


def _images_below(folder: str) -> list[str]:
    paths = []
    for base, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        paths += [
            os.path.join(base, n) for n in sorted(names) if n.lower().endswith(IMAGE_ENDINGS) and n[0] != "."
        ]
    return paths


class ImageLists(Reader):
    """Images named in text files, one ``path label`` a line (DomainNet, VisDA and others).

    A line with a path alone is unlabelled; a file must be all labelled or all unlabelled. Blank lines and
    lines that start with ``#`` are skipped. The last word is the label, so that paths may hold blanks.

    Args:
        root: folder that the paths start from.
        lists: list file of each domain, relative to ``root`` or absolute; several files with commas between.
        class_names: names of the labels 0, 1, ...; None: the labels as written are the names.
    """

    def __init__(self, root: str, lists: dict[str, str], class_names: list[str] | None = None) -> None:
        self.root = os.path.expanduser(str(root))
        self.lists, self.class_names = dict(lists), class_names

    def domains(self) -> list[str]:
        """Names of the domains."""
        return list(self.lists)

    def read(self, domain: str) -> DomainData:
        """Read one domain."""
        self._known(domain, "the lists")
        paths: list[str] = []
        names: list[str | None] = []
        for file in self.lists[domain].split(","):
            self._read_list(os.path.join(self.root, os.path.expanduser(file.strip())), paths, names)
        if not paths:
            raise UDAError(f"domain {domain!r}: list {self.lists[domain]!r} names no image")
        self._check_some(domain, paths)
        unlabelled = sum(n is None for n in names)
        if unlabelled == len(names):
            return DomainData(domain, FileInputs(paths), None, [], paths)
        if unlabelled:
            raise UDAError(
                f"domain {domain!r}: {unlabelled} of {len(names)} lines have no label; "
                "label all lines or none"
            )
        ids, classes = labels_by_name(names)  # type: ignore[arg-type]
        return DomainData(domain, FileInputs(paths), ids, classes, paths)

    def _check_some(self, domain: str, paths: list[str]) -> None:
        # A wrong root makes all paths wrong; one missing file is a matter of on_bad_image when it is loaded.
        sample = paths[:: max(1, len(paths) // 50)]
        missing = [p for p in sample if not os.path.isfile(p)]
        if len(missing) > len(sample) / 2:
            raise UDAError(
                f"domain {domain!r}: {len(missing)} of {len(sample)} listed files that were looked up "
                f"do not exist, {missing[0]!r} for one; check root"
            )

    def _read_list(self, file: str, paths: list[str], names: list[str | None]) -> None:
        if not os.path.isfile(file):
            raise UDAError(f"list file {file!r} does not exist")
        with open(file, encoding="utf-8") as lines:
            for number, raw in enumerate(lines, 1):
                line = raw.strip()
                if not line or line.startswith("#"):
                    continue
                path, *rest = line.rsplit(None, 1)
                label = rest[0] if rest else None
                if label is not None and label.lower().endswith(IMAGE_ENDINGS):
                    path, label = line, None
                paths.append(os.path.join(self.root, path))
                names.append(None if label is None else self._name(label, file, number))

    def _name(self, label: str, file: str, number: int) -> str:
        if self.class_names is None:
            return label
        if label in self.class_names:
            return label
        if label.isdecimal() and int(label) < len(self.class_names):
            return self.class_names[int(label)]
        raise UDAError(
            f"{file}, line {number}: label {label!r} is none of the {len(self.class_names)} class_names "
            "nor an index of them"
        )
