"""Metrics of partial, open-set and universal adaptation against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import uda
from uda import metrics
from uda.metrics.clusters import private_nmi

C = 4


def drawn(n=300, seed=0, truths=C + 3, missing=()):
    """Predictions, truths with private ids C, C + 1, ..., a mask and a score with ties."""
    rng = np.random.default_rng(seed)
    y = rng.choice([c for c in [-1, *range(truths)] if c not in missing], n)
    label = np.where(rng.random(n) < 0.6, np.clip(y, 0, C - 1), rng.integers(0, C, n))
    score = np.round(rng.random(n) + 0.3 * (y >= C), 1)
    return label, y, score > 0.8, score


def tensors(*arrays):
    return tuple(torch.from_numpy(np.asarray(a)) for a in arrays)


def naive(label, y, unknown):
    """Everything from lists, one sample at a time."""
    said = [C if u else k for k, u in zip(label, unknown, strict=True)]
    truth = [min(t, C) for t in y]
    per_class = {}
    for c in range(C + 1):
        hits = [s == c for s, t in zip(said, truth, strict=True) if t == c]
        if hits:
            per_class[c] = sum(hits) / len(hits)
    known = [s == t for s, t in zip(said, truth, strict=True) if 0 <= t < C]
    every = [s == t for s, t in zip(said, truth, strict=True) if t >= 0]
    star = [v for c, v in per_class.items() if c < C]
    nan = math.nan
    out = {
        "accuracy": sum(every) / len(every),
        "class": sum(per_class.values()) / len(per_class),
        "known": sum(known) / len(known) if known else nan,
        "star": sum(star) / len(star) if star else nan,
        "unk": per_class.get(C, nan),
    }
    a, i, u = out["star"], out["known"], out["unk"]
    out["h"], out["h_instance"] = (2 * v * u / (v + u) if v + u else 0.0 if v == v and u == u else nan for v in (a, i))
    absent = [c for c in range(C) if c not in per_class]
    lost = [s in absent for s, t in zip(said, truth, strict=True) if 0 <= t < C]
    out["outlier"] = sum(lost) / len(lost) if lost else nan
    return out


CASES = [{}, {"seed": 1, "missing": (1, 2)}, {"seed": 2, "truths": C}, {"seed": 3, "missing": (0, 1, 2, 3)}]


@pytest.mark.parametrize("case", CASES)
def test_counts(case):
    label, y, unknown, _ = drawn(**case)
    want = naive(label, y, unknown)
    parts = [slice(0, 100), slice(100, 101), slice(101, None)]
    for cls, options, key in (
        (metrics.Accuracy, {}, "accuracy"),
        (metrics.Accuracy, {"average": "class"}, "class"),
        (metrics.OS, {}, "class"),
        (metrics.OSStar, {}, "star"),
        (metrics.OSStar, {"average": "instance"}, "known"),
        (metrics.PartialAccuracy, {}, "known"),
        (metrics.UNK, {}, "unk"),
        (metrics.HScore, {}, "h"),
        (metrics.HScore, {"average": "instance"}, "h_instance"),
        (metrics.OutlierShare, {}, "outlier"),
    ):
        metric = cls(C, **options)
        for part in parts:
            metric.update(*tensors(label[part], y[part], unknown[part]))
        assert float(metric.compute()) == pytest.approx(want[key], nan_ok=True), (cls, options)
    marked = np.where(unknown, C, label)
    assert torch.equal(
        metrics.confusion_matrix(*tensors(label, y), C, torch.from_numpy(unknown)),
        metrics.confusion_matrix(*tensors(marked, y), C),
    )


def test_harmonic_mean_of_nothing():
    assert float(metrics.harmonic_mean(torch.tensor(0.0), torch.tensor(0.7))) == 0
    assert float(metrics.harmonic_mean(torch.tensor(0.0), torch.tensor(0.0))) == 0
    assert math.isnan(float(metrics.harmonic_mean(torch.tensor(0.0), torch.tensor(math.nan))))
    assert float(metrics.harmonic_mean(*torch.tensor([0.2, 0.5, 1.0]))) == pytest.approx(3 / (5 + 2 + 1))
    with pytest.raises(uda.UDAError, match="class or instance"):
        metrics.accuracy(torch.eye(3), "macro")


@pytest.mark.parametrize("case", CASES)
def test_curves(case):
    """Both areas by the trapezoids of curves that are traced threshold by threshold."""
    label, y, _, score = drawn(**case)
    known, private = (y >= 0) & (y < C), y >= C
    roc, ccr = [(0.0, 0.0)], [(0.0, 0.0)]
    if known.any() and private.any():
        for t in sorted(set(score[y >= 0])):  # accept what scores at most t
            accepted = score <= t
            false = (accepted & private).sum() / private.sum()
            roc.append((false, (accepted & known).sum() / known.sum()))
            ccr.append((false, (accepted & known & (label == y)).sum() / known.sum()))
    area = lambda curve: sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(curve))  # noqa: E731
    none = not (known.any() and private.any())
    for cls, curve in ((metrics.UnknownAUROC, roc), (metrics.OSCR, ccr)):
        metric = cls(C)
        for part in (slice(0, 120), slice(120, None)):
            metric.update(*tensors(score[part], label[part], y[part]))
        assert float(metric.compute()) == pytest.approx(math.nan if none else area(curve), nan_ok=True)


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    label, y, _, score = drawn()
    rows = y >= 0
    assert float(metrics.auroc(*tensors(score, y), C)) == pytest.approx(roc_auc_score(y[rows] >= C, score[rows]))
    right = np.where(y < C, y, label)
    area = metrics.auroc(*tensors(score, y), C)
    assert float(metrics.oscr(*tensors(score, right, y), C)) == pytest.approx(float(area))


def test_h3_score_sees_the_clusters():
    rng = np.random.default_rng(0)
    label, y, unknown, _ = drawn()
    centres = np.eye(C + 3) + 1e-3
    clear = centres[np.maximum(y, 0)] * rng.uniform(1, 9, (len(y), 1)) + 0.01 * rng.normal(size=(len(y), C + 3))
    confusion = metrics.confusion_matrix(*tensors(label, y), C, torch.from_numpy(unknown))
    star, u = (float(f(confusion)) for f in (metrics.known_accuracy, metrics.unk))
    for features, low, high in ((clear, 0.99, 1.0), (rng.normal(size=(len(y), C + 3)), 0.0, 0.2)):
        nmi = float(private_nmi(*tensors(features[y >= C], y[y >= C])))
        assert low <= nmi <= high
        metric = metrics.H3Score(C)
        for part in (slice(0, 90), slice(90, None)):
            metric.update(*tensors(label[part], y[part], features[part], unknown[part]))
        assert float(metric.compute()) == pytest.approx(3 / (1 / star + 1 / u + 1 / nmi), rel=1e-4)
    assert math.isnan(float(private_nmi(torch.zeros(0, 3), torch.zeros(0))))
    assert math.isnan(float(private_nmi(torch.full((4, 3), torch.nan), torch.arange(4) % 2)))  # a run that diverged


def test_evaluation_logs_them(quiet_trainer):
    from uda.data import DataModule, Generated

    split = {"known": ["0", "3"], "source_private": ["1"], "target_private": ["2", "4", "5"]}
    data = DataModule(
        Generated("blobs", classes=6, n=240, features=4, noise=0.5), "source", "target", classes=split, batch_size=16,
        eval_batch_size=50, epoch_steps=4, seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = uda.UDA("mlp", {"r": uda.Reject(quantile=0.3)}, bottleneck=8)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, data)
    logged = trainer.callback_metrics
    shown = {k.removeprefix("oracle/"): float(v) for k, v in logged.items() if k.startswith("oracle/")}
    rows = [model.batch(b["x"], index=b["index"]) for b in data.val_dataloader()[1]]
    y = torch.cat([b["y"] for b in data.val_dataloader()[1]])
    model.eval()
    with torch.no_grad():
        found = [model.predict_batch(b) for b in rows]
        features = torch.cat([b.features for b in rows])
    label, unknown, score = (torch.cat([getattr(p, n) for p in found]) for n in ("label", "unknown", "unknown_score"))
    assert sorted(set(y.tolist())) == [0, 1, 3, 4, 5]
    confusion = metrics.confusion_matrix(label, y, 3, unknown)
    nmi = private_nmi(features[y >= 3], y[y >= 3])
    want = {
        "target_accuracy": metrics.accuracy(confusion), "target_class_accuracy": metrics.os(confusion),
        "os": metrics.os(confusion), "os_star": metrics.known_accuracy(confusion), "unk": metrics.unk(confusion),
        "known_accuracy": metrics.partial_accuracy(confusion), "h_score": metrics.h_score(confusion),
        "h_score_instance": metrics.h_score(confusion, "instance"), "auroc": metrics.auroc(score, y, 3),
        "oscr": metrics.oscr(score, label, y, 3), "private_nmi": nmi, "h3_score": metrics.h3_score(confusion, nmi),
        "outlier_share": metrics.outlier_share(confusion),
    }  # fmt: skip
    multi_label = {"class_mean_ap", "mean_ap"}
    assert shown.keys() == want.keys() == uda.metrics.names.MEASURES.keys() - multi_label
    for name, value in want.items():
        assert shown[name] == pytest.approx(float(value), abs=1e-6), name
    assert 0 < shown["unk"] < 1
    assert set(trainer.callback_metrics) >= {"source_accuracy", "select/im", "select/collapsed"}


def test_summary_table_and_ledger_carry_the_headline(tmp_path, quiet_trainer, capsys):
    from uda.bench.tables import accuracy_table, frame, headline_of
    from uda.data import DataModule, Generated
    from uda.run import RunSummary

    records = []
    for setting, split in (("closed", None), ("universal", {"known": 3, "source_private": 1, "target_private": 2})):
        data = DataModule(
            Generated("blobs", classes=6, n=240, features=4, noise=0.5), "source", "target", classes=split,
            setting=setting, batch_size=16, eval_batch_size=50, epoch_steps=4, seed=0,
        )  # fmt: skip
        summary = RunSummary(tmp_path / setting, select_by="im")
        torch.manual_seed(0)
        model = uda.UDA("mlp", {"r": uda.Reject(threshold=0.3)}, bottleneck=8, scores=["im"])
        quiet_trainer(max_epochs=2, callbacks=[summary]).fit(model, data)
        found, told = summary.summary, capsys.readouterr().out
        assert found["setting"] == setting
        assert found["headline"] == ("target_accuracy" if setting == "closed" else "h_score")
        assert ("H-score" in told) == ("(universal)" in told) == ("h_score" in found) == (setting == "universal")
        if setting == "universal":
            assert found["h_score"].keys() == {"last", "selected", "oracle"}
            assert found["h_score"]["oracle"] >= found["h_score"]["last"]
            assert set(found) >= {"os", "os_star", "unk", "h3_score", "auroc", "oscr"}
        records.append({
            "suite": "s", "task": "t", "method": "m", "seed": 0, "key": setting, "status": "finished",
            "select_by": "im", "metrics": {k: v for k, v in found.items() if k in uda.metrics.names.MEASURES},
        } | ({} if setting == "closed" else {"headline": found["headline"]}))  # fmt: skip
    assert headline_of(records[1:]) == "h_score"
    table = accuracy_table(frame(records[1:], "h_score"), measure="h_score")
    assert "H-score in %" in table.caption
    assert table.rows[0][1] == f"{100 * found['h_score']['last']:.1f}"
    records[1]["task"] = "u"
    with pytest.raises(uda.UDAError, match="--measure"):
        headline_of(records)
