"""The field's benchmarks: a check of a local copy against what a complete one holds, and how to get one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from uda.data.arrays import Arrays
from uda.data.benchmark_table import BENCHMARKS, Benchmark
from uda.data.classes import plain
from uda.data.domains import BadImage, DomainData, FileInputs
from uda.data.readers import ImageFolders, Reader
from uda.errors import UDAError, nearest

__all__ = ["BENCHMARKS", "Benchmark", "Report", "benchmark", "check", "download"]


@dataclass
class Report:
    """What a check found; iterating gives the problems, none for a complete copy.

    Args:
        name: of the benchmark.
        root: of the copy.
        counts: images by domain and class.
        problems: a sentence each.
    """

    name: str
    root: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        return iter(self.problems)

    @property
    def complete(self) -> bool:
        """Whether nothing is missing or broken."""
        return not self.problems

    def __str__(self) -> str:
        found = [
            f"{domain}: {sum(classes.values()):,} images, {len(classes)} classes"
            for domain, classes in self.counts.items()
        ]
        return "\n".join([f"{self.name} in {self.root}", *found, *(f"problem: {p}" for p in self.problems)])


def benchmark(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        UDAError: unknown, with the nearest names.
    """
    if name not in BENCHMARKS:
        raise UDAError(f"unknown benchmark {name!r}. {nearest(name, BENCHMARKS)}")
    return BENCHMARKS[name]


def check(name: str, root: str, sample: int = 50) -> Report:
    """Compare a local copy with what a complete one holds.

    Args:
        name: of the benchmark.
        root: folder of the domain folders, or an array file.
        sample: images of each domain that are decoded, evenly spread.

    Raises:
        UDAError: unknown benchmark, or no such folder or file.
    """
    known, root = benchmark(name), os.path.expanduser(str(root))
    report = Report(name, root)
    if not os.path.exists(root):
        raise UDAError(f"{root!r} does not exist")
    reader: Reader = Arrays(root) if os.path.isfile(root) else ImageFolders(root)
    present = {plain(d): d for d in reader.domains()}
    for domain, expected in known.domains.items():
        found = present.get(plain(domain))
        if found is None:
            if domain not in known.optional:
                report.problems.append(f"domain {domain!r} is missing")
            continue
        try:
            data = _read(reader, found, known.subfolder)
        except UDAError as e:
            report.problems.append(str(e))
            continue
        _compare(known, domain, expected, data, report)
        report.problems += _unreadable(domain, data, sample)
    return report


def _read(reader: Reader, domain: str, subfolder: str) -> DomainData:
    if isinstance(reader, ImageFolders) and subfolder:
        if os.path.isdir(os.path.join(reader.root, domain, subfolder)):
            reader = ImageFolders(reader.root, subfolder)
    elif isinstance(reader, Arrays):
        try:
            return reader.read(domain)
        except UDAError:  # the same file may hold features
            reader = Arrays(reader.path, kind="features")
    return reader.read(domain)


def _compare(known: Benchmark, domain: str, expected: int, data: DomainData, report: Report) -> None:
    if data.labels is None:
        report.counts[domain] = {"": len(data)}
        report.problems.append(f"domain {domain!r} has no class folders")
    else:
        counts = torch.bincount(data.labels, minlength=len(data.class_names)).tolist()
        report.counts[domain] = dict(zip(data.class_names, counts, strict=True))
        if len(data.class_names) != known.classes:
            report.problems.append(
                f"domain {domain!r} has {len(data.class_names)} classes, expected {known.classes}"
            )
        wanted = {plain(c): c for c in known.class_names}
        missing = [c for p, c in wanted.items() if p not in {plain(n) for n in data.class_names}]
        if missing:
            report.problems.append(f"domain {domain!r} lacks class {', '.join(missing)}")
    if len(data) != expected:
        report.problems.append(f"domain {domain!r} has {len(data):,} images, expected {expected:,}")


def _unreadable(domain: str, data: DomainData, sample: int) -> list[str]:
    if not isinstance(data.inputs, FileInputs):
        return []
    problems = []
    for row in torch.linspace(0, len(data) - 1, min(sample, len(data))).long().unique().tolist():
        try:
            data.inputs.load(row)
        except BadImage as e:
            problems.append(f"domain {domain!r}: {e.path!r} is no readable image")
    return problems


def download(name: str, root: str) -> str:
    """Fetch a benchmark from the Hugging Face hub into ``root/<domain>/<class>/<image>``; gives the root.

    Needs the extra ``hub``. Files that are there already are not fetched or written again.

    Raises:
        UDAError: no hub copy is known, a package is missing, or the hub cannot be reached.
    """
    from uda.data.hub import fetch, unpack

    known, root = benchmark(name), os.path.expanduser(str(root))
    if not known.hub:
        raise UDAError(f"{known.title} has no known copy to download; get it from {known.source}")
    unpack(fetch(known.hub), root)
    return root
