"""Two processes train and hold equal parameters and buffers: all cases share one pair of processes."""

from __future__ import annotations

import pytest
from uda_selftraining import (
    ATDOC,
    BNM,
    MCC,
    EntropyMinimisation,
    FixMatch,
    GeT,
    Jigsaw,
    MeanTeacher,
    PseudoLabel,
    Rotation,
    SelfTraining,
)

from uda.testing import check_plugins_ddp

LABELS = {"pseudo": {"class_path": "uda_selftraining.pseudo_label.PseudoLabel", "init_args": {"threshold": 0.3}}}


@pytest.mark.slow
def test_all_methods():
    check_plugins_ddp([
        (FixMatch, {"init_args": {"threshold": 0.4}}),
        (PseudoLabel, {"init_args": {"threshold": 0.3, "update": "epoch", "share": 0.5, "soft": True}}),
        (SelfTraining, {"partners": LABELS}),
        (MeanTeacher, {"init_args": {"threshold": 0.3}}),
        (MeanTeacher, {"init_args": {"threshold": 0.0, "statistics": "average", "labels": True}}),
        (Rotation, {"kind": "images", "sources": 2}),
        (Jigsaw, {"kind": "images", "init_args": {"grid": 2, "permutations": 5}}),
        (MCC, {}),
        (EntropyMinimisation, {"init_args": {"diversity": True, "ramp": "linear"}}),
        (BNM, {}),
        (ATDOC, {"init_args": {"mode": "na"}}),
        (ATDOC, {"init_args": {"mode": "nc"}}),
        (GeT, {"init_args": {"temperature": 0.1, "mass": "domain"}}),
        (GeT, {"sources": 2, "init_args": {"posterior": "logits", "prior_estimate": "cosine"}}),
    ])  # fmt: skip
