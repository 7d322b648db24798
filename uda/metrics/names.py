"""Names of the measures and settings, without torch: tables and command lines need no more."""

from __future__ import annotations

#: Which classes source and target have in common.
LABEL_SETTINGS = ("closed", "partial", "open", "universal")

#: Measures of a run on target labels (``oracle/<name>``), by how they are told.
MEASURES = {
    "target_accuracy": "Target accuracy",
    "target_class_accuracy": "Target class-mean accuracy",
    "h_score": "H-score",
    "h_score_instance": "H-score of instance accuracies",
    "h3_score": "H3-score",
    "os": "OS",
    "os_star": "OS*",
    "unk": "UNK",
    "auroc": "AUROC of the unknown score",
    "oscr": "OSCR",
    "known_accuracy": "Accuracy on known classes",
    "private_nmi": "NMI of clusters and target-private classes",
    "class_mean_ap": "Class-mean average precision",
    "mean_ap": "Mean average precision over samples",
    "outlier_share": "Share taken for classes that the target lacks",
}

#: Figures of the sources' held-out samples; those of single sources have the first as a prefix.
SOURCE_FIGURES = ("source_accuracy", "source_class_mean_ap", "source_mean_ap")

#: The measure that stands for a run of the setting.
HEADLINES = {"closed": "target_accuracy", "partial": "target_accuracy", "open": "h_score", "universal": "h_score"}
#: The one of a multi-label run.
MULTI_LABEL_HEADLINE = "class_mean_ap"


def oracle(measure: str) -> str:
    """Key of a measure among a run's figures. Nothing with this prefix may choose anything: target labels are in it."""
    return f"oracle/{measure}"
