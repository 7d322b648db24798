"""Rejection by a threshold."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from itertools import pairwise

import lightning as L
import numpy as np
import pytest
import torch

import uda
from uda.rejection import Reject, energy, normalised_entropy, otsu
from uda.run.predictions import PredictionWriter
from uda.testing import check_plugin

OPEN_BLOBS = {"setting": "open", "classes": {"known": 2, "target_private": 1}, "seed": 0}
OPEN = {"classes": {"known": ["a", "b"], "target_private": ["c"]}}


def logits():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_measures_by_hand():
    z = logits().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    entropy = [-sum(x * math.log(x) for x in row) / math.log(4) for row in p]
    assert normalised_entropy(logits()).tolist() == pytest.approx(entropy)
    assert energy(logits(), 2.0).tolist() == pytest.approx([-2 * math.log(sum(math.exp(x / 2) for x in r)) for r in z])
    assert float(normalised_entropy(torch.zeros(1, 4))) == pytest.approx(1)
    assert float(normalised_entropy(torch.tensor([[1e4, 0.0]]))) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"measure": "entropi"}, "entropy"),
        ({"measure": "energy"}, "give threshold or quantile"),
        ({"threshold": 0.5, "quantile": 0.5}, "not both"),
        ({"quantile": 0.5, "split": True}, "not both"),
        ({"measure": "confidence", "split": True}, "entropy or energy"),
        ({"quantile": 1.0}, "between 0 and 1"),
        ({"measure": "energy", "threshold": 1.0, "temperature": 0.0}, "positive"),
    ],
)
def test_arguments(arguments, words):
    with pytest.raises(uda.UDAError, match=words):
        Reject(**arguments)


class Head(uda.Plugin):
    """A method with a predict of its own."""

    @uda.hookimpl
    def predict(self, batch):
        b = len(batch)
        return uda.Prediction(torch.zeros(b, dtype=torch.long), torch.linspace(0, 1, b), torch.arange(b) == b - 1)


class Stricter(uda.Plugin):
    """Looks at what the plugin before it has left."""

    @uda.hookimpl
    def reject(self, prediction):
        return replace(prediction, unknown=prediction.unknown | (prediction.label == 0))


def built(*plugins, **given):
    return uda.UDA(
        torch.nn.Identity(),
        {f"p{i}": p for i, p in enumerate(plugins)},
        num_classes=3, input_shape=[6], source_names=["source"], target_name="target", sizes={}, **given,
    ).eval()  # fmt: skip


def test_prediction_is_that_of_the_method():
    model = built(Reject("confidence", threshold=0.45), Head())
    found = model.predict_batch(model.batch(torch.randn(5, 6)))
    assert found.unknown_scores.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert found.unknown.tolist() == [True, True, True, False, True]  # the last one by the method itself
    assert found.marked(3).tolist() == [3, 3, 3, 0, 3]
    source = model.predict_batch(model.batch(torch.randn(5, 6), role="source"))
    assert source.unknown is None


def test_plugins_are_chained():
    model = built(Reject(threshold=2.0), Stricter())
    found = model.predict_batch(model.batch(torch.randn(40, 6)))
    assert torch.equal(found.unknown, found.label == 0)
    assert model.hooks.fillers("reject") == ["p0", "p1"]


def test_quantile_is_that_of_the_source():
    model = built(Reject("energy", quantile=0.75))
    x = torch.randn(41, 6)
    with torch.no_grad(), pytest.raises(uda.UDAError, match="not known yet"):
        model.predict_batch(model.batch(x))
    with torch.no_grad():
        for part in x.split(8):
            model.predict_batch(model.batch(part, role="source"))
        seen = energy(model.batch(x).logits)
        model.predict_batch(model.batch(x[:3] + 100))
        found = model.predict_batch(model.batch(x))
    assert float(model.plugins["p0"].limit) == pytest.approx(float(np.quantile(seen.numpy(), 0.75)), rel=1e-5)
    assert int(found.unknown.sum()) == 10
    with pytest.raises(uda.UDAError, match="source-free"):
        uda.UDA(torch.nn.Identity(), {"r": Reject(quantile=0.9)}, num_classes=3, input_shape=[6], sizes={})


def test_otsu_by_loops():
    draw = np.random.default_rng(0)
    for x in (np.r_[draw.normal(0, 1, 30), draw.normal(4, 0.5, 11)], draw.random(9), np.array([1.0, 2, 2, 2, 5])):
        cuts = {(a + b) / 2 for a, b in pairwise(np.sort(x)) if a < b}
        within = {t: sum(part.var() * len(part) for part in (x[x < t], x[x > t])) for t in cuts}  # least within: Otsu's
        assert otsu(torch.tensor(x)) == pytest.approx(min(within, key=within.get))
    assert otsu(torch.tensor([0.3, 0.3, 0.3], dtype=torch.float64)) == 0.3
    assert otsu(torch.tensor([2.0])) == 2


def test_split_is_that_of_the_target():
    data = uda.DataModule(
        uda.data.Generated("blobs", classes=3, n=90, features=6, seed=1), "source", "target", batch_size=30,
        **OPEN_BLOBS,
    )  # fmt: skip
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    model = uda.UDA("identity", {"r": Reject(split=True)}, bottleneck=0)
    x = torch.randn(4, 6)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    trainer.fit(model, data)
    target = torch.cat([b["x"] for b in data.pool_dataloader("target")])
    with torch.no_grad():
        assert float(model.plugins["r"].limit) == pytest.approx(otsu(normalised_entropy(model(target))), abs=1e-6)
        model.plugins["r"].limit.fill_(math.nan)
        with pytest.raises(uda.UDAError, match="cut of the target is not known"):
            model.predict_batch(model.batch(x))


def test_predictions_keep_class_mark_and_score(tmp_path):
    data = uda.DataModule(
        uda.data.Generated("blobs", classes=3, n=90, features=6, seed=1), "source", "target", batch_size=30,
        **OPEN_BLOBS,
    )  # fmt: skip
    torch.manual_seed(0)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    model = uda.UDA("identity", {"r": Reject(split=True)}, bottleneck=0)
    writer = PredictionWriter(tmp_path)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[writer], **dict.fromkeys(off, False))
    trainer.fit(model, data)
    found = {k: torch.cat([b[k] for b in trainer.predict(model, data)]) for k in ("label", "unknown", "unknown_score")}
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = data.class_names
    assert [r["class"] for r in rows] == [names[i] for i in found["label"]]
    marked = zip(found["label"], found["unknown"], strict=True)
    assert [r["label"] for r in rows] == ["unknown" if u else names[i] for i, u in marked]
    assert [int(r["unknown"]) for r in rows] == found["unknown"].int().tolist()
    assert [float(r["unknown_score"]) for r in rows] == pytest.approx(found["unknown_score"].tolist(), abs=1e-6)
    assert 0 < sum(int(r["unknown"]) for r in rows) < len(rows)


def test_plugin():
    report = check_plugin(
        Reject, init_args={"quantile": 0.8}, data_args=OPEN, ddp=False, liveness=False,
        skip={"accumulation": "nothing is trained", "precision": "nothing is trained"},
    )  # fmt: skip
    assert "no_label_leak" in report.passed


@pytest.mark.slow
def test_plugin_under_two_processes():
    check_plugin(Reject, init_args={"quantile": 0.8}, data_args=OPEN, only=["ddp"])
