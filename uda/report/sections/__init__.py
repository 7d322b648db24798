"""The parts of a report, each from the runs alone: a module each, whose ``section`` makes it."""

from __future__ import annotations

from uda.report.html import Section
from uda.report.sections import (
    classes,
    confidence,
    curves,
    embedding,
    mistakes,
    overview,
    pictures,
    provenance,
    settings,
    shares,
)
from uda.report.sections.base import RULES, Report, method

__all__ = ["PARTS", "RULES", "Report", "all_sections", "method"]

#: in the order of the page
PARTS = (overview, settings, curves, classes, embedding, confidence, shares, mistakes, pictures, provenance)


def all_sections(report: Report) -> list[Section]:
    """Every part, in order; a part may have nothing to show."""
    return [made for part in PARTS if (made := part.section(report)) is not None]
