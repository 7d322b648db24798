"""The figures of a report: each function draws arrays on a new Matplotlib figure and does nothing else."""

from __future__ import annotations

from uda.report.figures.classes import MANY, class_accuracy, confusion, shown_classes
from uda.report.figures.confidence import FEW, reliability, wilson
from uda.report.figures.lines import Line, curves, run_color, score_curve
from uda.report.figures.pictures import gallery
from uda.report.figures.planes import class_colors, embedding_classes, embedding_domains, embedding_errors
from uda.report.figures.shares import priors

__all__ = [
    "FEW",
    "MANY",
    "Line",
    "class_accuracy",
    "class_colors",
    "confusion",
    "curves",
    "embedding_classes",
    "embedding_domains",
    "embedding_errors",
    "gallery",
    "priors",
    "reliability",
    "run_color",
    "score_curve",
    "shown_classes",
    "wilson",
]
