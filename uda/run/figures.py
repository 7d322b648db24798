"""Figures of an evaluation, and the table at the end of a fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L

from uda.metrics.names import HEADLINES, MEASURES, MULTI_LABEL_HEADLINE, SOURCE_FIGURES, oracle


def figures_of(trainer: L.Trainer, prefix: str = "") -> dict[str, float]:
    """Accuracies and label-free scores of the evaluation that has just ended."""
    wanted = (*SOURCE_FIGURES, "oracle/", "select/")
    found = {k.removeprefix(prefix): v for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}
    return {k: float(v) for k, v in found.items() if k.startswith(wanted)}


def rounded(value: float | None) -> float | None:
    """Six digits: a float32 has no more."""
    return None if value is None or not math.isfinite(value) else round(value, 6)


def percent(value: float | None) -> str:
    """``93.4``, or a dash."""
    return "-" if value is None else f"{100 * value:.1f}"


def setting_of(datamodule: Any) -> dict[str, Any]:
    """``setting`` of the label sets and its ``headline`` measure; and what makes a run semi-supervised."""
    setting = getattr(datamodule, "setting", None)
    out = {"setting": setting, "headline": HEADLINES.get(setting, "target_accuracy")}
    if getattr(datamodule, "multi_label", False):
        out |= {"task": "multi-label", "headline": MULTI_LABEL_HEADLINE}
    if few := getattr(datamodule, "labelled_target", 0):
        out |= {"supervision": "semi-supervised", "labelled_target": few}
    return out


def measures_of(*figures: Mapping[str, float]) -> list[str]:
    """Names of the measures on target labels among the figures; the two accuracies always."""
    always = ("target_accuracy", "target_class_accuracy")
    return [m for m in MEASURES if m in always or any(oracle(m) in f for f in figures)]


def print_table(summary: dict[str, Any]) -> None:
    """The table at the end of a fit."""
    from rich.console import Console
    from rich.table import Table

    source = ", ".join(summary["source"]) or "no source"
    few, setting = summary.get("labelled_target"), summary.get("setting")
    told = [] if setting in (None, "closed") else [setting]
    told += [summary["task"]] if "task" in summary else []
    told += [f"semi-supervised: {few} labelled target samples a class"] if few else []
    suffix = f" ({', '.join(told)})" if told else ""
    table = Table(title=f"{source} -> {summary['target']}{suffix}", title_justify="left", title_style="bold")
    table.add_column("accuracy, %")
    table.add_column("images", justify="right")
    table.add_column("class mean", justify="right")
    headline = summary.get("headline")
    extra = {} if headline in (None, "target_accuracy") else summary.get(headline, {})  # none where nothing is labelled
    source_extra = summary.get(f"source_{headline}")
    if extra:
        table.add_column(MEASURES[headline], justify="right")
    table.add_column("chosen by", overflow="fold")

    def row(name: str, first: Any, second: Any, which: str, by: str) -> None:
        more = [percent(extra.get(which, source_extra if name == "source" else None))] if extra else []
        table.add_row(name, percent(first), "" if second is None else percent(second), *more, by)

    instance, mean = summary["target_accuracy"], summary["target_class_accuracy"]
    selection = summary["selection"]
    chosen = f"{selection['score']} (label-free), epoch {selection['epoch']}"
    if selection["epoch"] is None:
        chosen = f"{selection['score']}: no epoch to choose, see docs/selection.md"
    row("source", summary["source_accuracy"], None, "", "last epoch")
    for name, which, by in (
        ("target", "last", "last epoch"), ("target, selected", "selected", chosen),
        ("target, oracle", "oracle", "target labels: report only"),
    ):  # fmt: skip
        row(name, instance[which], mean[which], which, by)
    console = Console()
    console.print(table)
    if summary["last_validation_step"] not in (None, summary["steps"]):
        console.print(
            f"The last validation was at step {summary['last_validation_step']} of {summary['steps']}: make "
            "the steps a multiple of data.epoch_steps to have figures of the end."
        )
