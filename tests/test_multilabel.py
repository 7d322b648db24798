"""Multi-label tasks: labels of 0 and 1, binary cross-entropy, average precisions, and who serves them."""

from __future__ import annotations

import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch
import yaml

import uda
from uda.cli import main
from uda.losses import multi_label_loss
from uda.metrics.multilabel import class_mean_ap, mean_ap
from uda.run.figures import print_table
from uda.selection.multilabel import MultiLabelScores
from uda.shift.inspect import inspect_shift


def generated(n=96, classes=4, size=12, shift=0.0, seed=0):
    """Sums of class patterns; ``shift`` moves all of them."""
    draw = np.random.default_rng(seed)
    patterns = np.random.default_rng(7).normal(size=(classes, size))
    y = (draw.random((n, classes)) < 0.4).astype(np.float32)
    return (y @ patterns + shift + 0.5 * draw.normal(size=(n, size))).astype(np.float32), y


@pytest.fixture
def file(tmp_path):
    (a, ya), (b, yb) = generated(), generated(shift=0.5, seed=1)
    np.savez(tmp_path / "set.npz", a_x=a, a_y=ya, b_x=b, b_y=yb, c_x=b, classes=["w", "x", "y", "z"])
    return str(tmp_path / "set.npz")


def module(file, source="a", target="b", **more):
    reader = uda.data.Arrays(file, kind="features", multi_label=True)
    return uda.DataModule(reader, source, target, batch_size=16, **more)


def fit(model, data, epochs=1):
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(model, data)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


def average_precision(score, y):
    order = np.argsort(-score)
    hits = np.cumsum(y[order])
    return sum(hits[i] / (i + 1) for i in range(len(y)) if y[order][i]) / y.sum()


def test_measures_by_loops():
    draw = np.random.default_rng(0)
    p, y = draw.random((30, 5)), (draw.random((30, 5)) < 0.3).astype(float)
    y[:, 4] = 0  # a class that does not occur
    classes = np.mean([average_precision(p[:, c], y[:, c]) for c in range(4)])
    samples = np.mean([average_precision(p[i], y[i]) for i in range(30) if y[i].sum()])
    assert float(class_mean_ap(torch.tensor(p), torch.tensor(y))) == pytest.approx(classes, abs=1e-6)
    assert float(mean_ap(torch.tensor(p), torch.tensor(y))) == pytest.approx(samples, abs=1e-6)


def test_loss_by_loops():
    z, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    p, t = z.sigmoid().numpy(), 0.9 * y.numpy() + 0.05
    term = lambda i, c: t[i, c] * np.log(p[i, c]) + (1 - t[i, c]) * np.log(1 - p[i, c])  # noqa: E731
    rows = [-np.mean([term(i, c) for c in range(4)]) for i in range(3)]
    weight = torch.tensor([1.0, 0.0, 2.0])
    assert float(multi_label_loss(z, y, 0.1)) == pytest.approx(np.mean(rows))
    assert float(multi_label_loss(z, y, 0.1, weight)) == pytest.approx((rows[0] + 2 * rows[2]) / 3)
    with pytest.raises(uda.UDAError, match="shape"):
        multi_label_loss(z, y[:, :2])


def test_scores_by_loops():
    z = torch.randn(9, 3)
    p = z.double().sigmoid().numpy()
    h = lambda q: -(q * np.log(q) + (1 - q) * np.log(1 - q))  # noqa: E731
    scores = MultiLabelScores(3)
    for part in z.split(4):
        scores.update(part)
    found = scores.compute()
    assert found["select/entropy"] == pytest.approx(-h(p).mean(), abs=1e-5)
    assert found["select/diversity"] == pytest.approx(h(p.mean(0)).mean(), abs=1e-5)
    assert found["guarded/im"] == pytest.approx(h(p.mean(0)).mean() - h(p).mean(), abs=1e-5)
    constant = MultiLabelScores(3)
    constant.update(torch.ones(5, 3))
    assert constant.compute()["select/collapsed"] == 1


def test_training_and_figures(file):
    data = module(file)
    model = uda.UDA("identity", bottleneck=16)
    found = fit(model, data, 12)
    assert model.multi_label
    assert model.class_names == ["w", "x", "y", "z"]
    z = model.eval()(torch.from_numpy(np.load(file)["b_x"])).detach().sigmoid()
    y = torch.from_numpy(np.load(file)["b_y"])
    assert found["oracle/class_mean_ap"] == pytest.approx(float(class_mean_ap(z, y)), abs=1e-5)
    assert found["source_class_mean_ap"] > 0.6  # chance is about 0.4
    assert "oracle/target_accuracy" not in found
    batch = next(iter(data.train_dataloader()))[0]
    assert "y" not in batch.get("target", {})
    assert batch["sources"]["a"]["y"].shape == (16, 4)


def test_an_unlabelled_target_has_no_figure(file):
    found = fit(uda.UDA("identity", bottleneck=16), module(file, target="c"))
    assert not [k for k in found if k.startswith("oracle/")]
    assert "select/im" in found


def test_the_order_of_known_classes(file):
    data = module(file, classes={"known": ["z", "x"]})
    y = np.load(file)["b_y"]
    assert data.class_names == ["z", "x"]
    np.testing.assert_array_equal(data.task.target.eval.labels.numpy(), y[:, [3, 1]])


def test_refusals(file):
    with pytest.raises(uda.UDAError, match=r"Plugin 'refine' \(Reject\) does not serve multi-label data"):
        fit(uda.UDA("identity", {"refine": uda.Reject()}, bottleneck=16), module(file))
    for more in ({"setting": "open"}, {"keep": {"a": {"w": 0.5}}}, {"labelled_target": 1}):
        with pytest.raises(uda.UDAError, match="multi-label"):
            module(file, **more).task  # noqa: B018
    with pytest.raises(uda.UDAError, match=r"give data\.classes\.known"):
        module(file, None, "c").task  # noqa: B018
    with pytest.raises(uda.UDAError, match="several: multi_label: true"):
        uda.DataModule(uda.data.Arrays(file, kind="features"), "a", "b").task  # noqa: B018


@pytest.fixture
def words(file, tmp_path):
    """Of a run from the command line."""
    config = {
        "model": {"backbone": "identity", "bottleneck": 16},
        "data": {
            "reader": {"class_path": "Arrays", "init_args": {"path": file, "kind": "features", "multi_label": True}},
            "source": "a", "target": "b", "batch_size": 16,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False},
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    return ["fit", "--config", str(tmp_path / "c.yaml")]


def test_the_command_line(words, tmp_path, capsys):
    assert main([*words, f"--run_dir={tmp_path / 'r0'}", "--select_by=snd"]) == 2
    assert "Score 'snd' is of a softmax" in capsys.readouterr().err
    assert main([*words, f"--run_dir={tmp_path / 'r'}", "--select_by=im"]) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    print_table({k: v for k, v in summary.items() if k not in ("class_mean_ap", "mean_ap")})  # a target without labels
    assert summary["task"] == "multi-label"
    assert summary["headline"] == "class_mean_ap"
    assert 0 < summary["class_mean_ap"]["last"] <= 1
    assert 0 < summary["source_class_mean_ap"] <= 1
    assert summary["target_accuracy"]["last"] is None


def test_a_look_at_the_shift_is_refused(file):
    with pytest.raises(uda.UDAError, match="the data is multi-label: a look at the shift takes one class a sample"):
        inspect_shift(module(file))


@pytest.mark.slow
def test_a_report_shows_average_precisions(words, tmp_path, capsys):
    assert main([*words, f"--run_dir={tmp_path / 'r'}", "--select_by=im"]) == 0
    assert main(["report", str(tmp_path / "r")]) == 0
    assert "multi-label: parts that need one class a sample" in capsys.readouterr().err
    page, summary = ((tmp_path / "r" / name).read_text() for name in ("report.html", "summary.json"))
    for rule in ("source_class_mean_ap", "class_mean_ap", "mean_ap"):
        value = json.loads(summary)[rule]
        assert f"{100 * (value if isinstance(value, float) else value['last']):.1f}" in page
    assert "Average precision in percent over training steps: target ends at" in page
    assert "The target has no labels" not in page
    other = json.loads(summary) | {"task": None}
    shutil.copytree(tmp_path / "r", tmp_path / "single")
    (tmp_path / "single" / "summary.json").write_text(json.dumps(other))
    assert main(["report", str(tmp_path / "r"), str(tmp_path / "single"), f"--out={tmp_path / 'x.html'}"]) == 2
    assert "one is multi-label and one is not" in capsys.readouterr().err


class Kept(L.Callback):
    """What each process has at the end."""

    def __init__(self, path):
        self.path = path

    def on_fit_end(self, trainer, model):
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if "/" in k or k.startswith("source_")}
        torch.save((figures, model.state_dict()), f"{self.path}/{trainer.world_size}-{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(tmp_path):
    """61 and 95 rows: the last batches are uneven, and padding must not count."""
    (a, ya), (b, yb) = generated(61), generated(95, shift=0.5, seed=1)
    np.savez(tmp_path / "set.npz", a_x=a, a_y=ya, b_x=b, b_y=yb)
    reader = uda.data.Arrays(str(tmp_path / "set.npz"), kind="features", multi_label=True)
    for count, strategy in ((1, "auto"), (2, "ddp_fork")):
        L.seed_everything(0, verbose=False)
        model = uda.UDA("identity", bottleneck=8, bottleneck_norm="none")
        data = uda.DataModule(reader, "a", "b", batch_size=16 // count, eval_batch_size=8, epoch_steps=6, seed=0)
        trainer = L.Trainer(
            max_epochs=2, accelerator="cpu", devices=count, strategy=strategy, logger=False, callbacks=Kept(tmp_path),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
    (one, weights), (first, w0), (second, w1) = (torch.load(tmp_path / f"{n}.pt") for n in ("1-0", "2-0", "2-1"))
    assert first == second
    assert {"oracle/class_mean_ap", "oracle/mean_ap", "source_class_mean_ap", "select/im"} <= set(first)
    assert first == pytest.approx(one, abs=1e-4)
    for name, value in weights.items():
        assert torch.equal(w0[name], w1[name])
        torch.testing.assert_close(w0[name], value, atol=1e-4, rtol=1e-4)
