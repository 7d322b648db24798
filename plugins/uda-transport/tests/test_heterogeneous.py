"""COOT and UCOOT inside a training, over domains of different shapes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_transport import COOT, UCOOT
from uda_transport.planview import blocks, in_order

import uda
from uda.testing import check_plugin, check_plugins_ddp


def spaces(width_s=9, width_t=14, n=60, m=48, seed=0):
    draw = np.random.default_rng(seed)
    hidden = draw.normal(size=(3, 6)) * np.array([3, 2.5, 2, 1.5, 1, 0.5])
    out = {}
    for name, size, width in (("s", n, width_s), ("t", m, width_t)):
        labels = draw.permutation(np.arange(size) % 3)
        x = hidden[labels][:, np.arange(width) % 6] + 0.3 * draw.normal(size=(size, width))
        out |= {f"{name}_x": x.astype(np.float32), f"{name}_y": labels.astype(np.int64)}
    return out


def filled(plugin, soft, mass):
    size, classes = soft.shape
    model = SimpleNamespace(num_classes=classes, target_name="t", sizes={"t": size})
    plugin.build(model)
    plugin.soft.copy_(soft)
    plugin.mass.copy_(mass)
    return plugin


def test_objective_by_loops():
    torch.manual_seed(0)
    soft, mass = torch.rand(6, 3).softmax(1), torch.tensor([0.05, 0.5, 1.0, 1.7, 0.0, 0.2])
    logits = torch.randn(6, 3, requires_grad=True)
    step = SimpleNamespace(target=SimpleNamespace(index=torch.arange(6), logits=logits), progress=0.5)
    for labels in ("soft", "hard"):
        plugin = filled(COOT(weight=2.0, labels=labels), soft, mass)
        value = plugin.refine_classifier(step)["transported"]
        total = 0.0
        for i in range(6):
            w = 0.0 if mass[i] < 0.1 else min(float(mass[i]), 1.0)
            p = soft[i] if labels == "soft" else torch.eye(3)[soft[i].argmax()]
            total += w * float(-(p * logits[i].detach().log_softmax(0)).sum())
        assert float(value) == pytest.approx(2.0 * total / 6, rel=1e-5)
    value.backward()
    assert logits.grad[4].abs().sum() == 0 < logits.grad[1].abs().sum()


def test_picture_shows_a_shuffled_band():
    band = np.kron(np.eye(4), np.ones((5, 6)))
    draw = np.random.default_rng(0)
    rows, columns = in_order(band[draw.permutation(20)][:, draw.permutation(24)] + 1e-6)
    assert sorted(rows) == list(range(20))
    assert sorted(columns) == list(range(24))
    assert blocks(np.ones((500, 3))).shape == (200, 3)
    assert blocks(np.ones((500, 3))).sum() == 1500


def test_bad_arguments():
    for options in ({"space": "pixels"}, {"labels": "some"}, {"normalise": "no"}, {"starts": 0}, {"max_samples": 1},
                    {"epsilon": -1.0}, {"label_cost": -1.0}, {"weight": -1.0}):  # fmt: skip
        with pytest.raises(uda.UDAError):
            COOT(**options)
    with pytest.raises(uda.UDAError):
        UCOOT(epsilon=0.0)


@pytest.mark.slow
def test_domains_of_different_shapes_end_to_end(tmp_path):
    np.savez(tmp_path / "data.npz", **spaces())
    config = tmp_path / "run.yaml"
    config.write_text(f"""
model:
  backbone:
    class_path: uda.nn.PerDomain
    init_args:
      backbones:
        source: {{class_path: uda.nn.MLP, init_args: {{hidden: [16], in_features: 9}}}}
        target: {{class_path: uda.nn.MLP, init_args: {{hidden: [16], in_features: 14}}}}
  bottleneck: 0
  plugins: {{refine: {{class_path: COOT, init_args: {{max_iter: 10}}}}}}
data:
  reader: {{class_path: uda.data.Arrays, init_args: {{path: {tmp_path}/data.npz, kind: features}}}}
  source: s
  target: t
  heterogeneous: true
  labelled_target: 2
  target_test_fraction: 0.25
  batch_size: 16
  epoch_steps: 20
trainer: {{max_epochs: 2, accelerator: cpu, enable_progress_bar: false}}
""")
    from uda.cli import main

    run = tmp_path / "run"
    assert main(["fit", "--config", str(config), "--run_dir", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["supervision"], summary["labelled_target"]) == ("semi-supervised", 2)
    names = {p.name for p in (run / "transport").iterdir()}
    assert names == {"refine_s.npz", "refine_s.json", "refine_s.png"}
    plans = np.load(run / "transport" / "refine_s.npz")
    assert plans["features"].shape == (9, 14)
    assert plans["samples"].shape == (54, 36)
    assert main(["predict", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    rows = (run / "predictions.csv").read_text().splitlines()
    assert len(rows) == 1 + 12  # those that no plan has seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "init_args"),
    [
        (COOT, {"max_iter": 5}),
        (UCOOT, {"epsilon": 0.3, "epsilon_features": 0.3, "max_iter": 3, "space": "features", "labels": "soft"}),
    ],
)
def test_plugin(cls, init_args):
    report = check_plugin(cls, init_args=init_args, ddp=False)
    assert report.objectives == ["transported"]


@pytest.mark.slow
def test_under_two_processes():
    unbalanced = {"space": "features", "max_iter": 3, "epsilon_features": 0.3}
    check_plugins_ddp([(COOT, {"init_args": {"max_iter": 5}}), (UCOOT, {"init_args": unbalanced})])
