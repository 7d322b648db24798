"""The callback in small runs: what it finds, and that it disturbs nothing."""

from __future__ import annotations

import json

import lightning as L
import pytest
import torch

import uda
from uda.diagnostics import RepresentationSimilarity, cka, covariance_similarity, dcka, explained_by
from uda.nn import MLP
from uda.testing import TinyTask
from uda.testing.task import MeanGap


def run(tmp_path, *callbacks, epochs=2, ckpt_path=None, plugins=None, **trainer):
    torch.manual_seed(3)
    data = uda.DataModule(TinyTask(), source="source", target="target", batch_size=8, epoch_steps=3, seed=5)
    model = uda.UDA(MLP([16]), plugins or {"gap": MeanGap()}, bottleneck=8)
    model.base_seed = 1
    options = {
        "max_epochs": epochs, "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, **trainer,
    }  # fmt: skip
    fitted = L.Trainer(callbacks=list(callbacks), default_root_dir=tmp_path, **options)
    fitted.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return fitted, model


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    seen = RepresentationSimilarity(["backbone", "bottleneck"], samples=24, batch_size=10)
    trainer, model = run(folder, seen)
    return folder, seen, trainer, model


def test_figures_of_the_last_epoch(watched):
    folder, seen, trainer, model = watched
    rows = json.loads((folder / "similarity.json").read_text())
    assert [row["epoch"] for row in rows] == [-1, 0, 1]
    for domain in ("source", "target"):
        for layer in ("backbone", "bottleneck"):
            assert rows[0]["start"][domain][layer] == pytest.approx(1.0, abs=1e-5)
            assert rows[2]["start"][domain][layer] < 0.9999  # training has moved it
            logged = float(trainer.callback_metrics[f"similarity/{domain}/{layer}"])
            assert logged == pytest.approx(rows[2]["start"][domain][layer], abs=1e-6)
    model.eval()
    outputs = {}
    with torch.no_grad():
        for domain in ("source", "target"):
            task = trainer.datamodule.task[domain]
            positions = seen.probes(len(task.train))
            assert len(positions) == 24
            x = task.data.inputs.fetch(torch.as_tensor(task.train.rows)[positions])
            z = model.backbone(x)
            outputs[domain] = (x, z, model.bottleneck(z))
    for domain, (x, z, f) in outputs.items():
        expected = float(dcka(z, f, x, unbiased=True))
        assert rows[2]["layers"][domain]["backbone"]["bottleneck"] == pytest.approx(expected, abs=1e-5)
        assert rows[2]["explained"][domain]["bottleneck"] == pytest.approx(float(explained_by(f, x)), abs=1e-5)
    expected = float(covariance_similarity(outputs["source"][2], outputs["target"][2]))
    assert rows[2]["covariance"]["source"]["bottleneck"] == pytest.approx(expected, abs=1e-5)
    assert float(trainer.callback_metrics["covariance/source/bottleneck"]) == pytest.approx(expected, abs=1e-5)


def test_plain_cka_where_nothing_is_taken_out(watched, tmp_path):
    _, _, _, model = watched
    plain = RepresentationSimilarity(["backbone", "bottleneck"], deconfound=False, unbiased=False)
    x = torch.rand(20, 6)
    z = model.eval().backbone(x).detach()
    f = model.bottleneck(z).detach()
    activations = {"": x, "backbone": z, "bottleneck": f}
    plain.start = {"target": plain.kernels(activations)}
    row = plain.compare({"target": activations}, "target")
    assert row["layers"]["target"]["backbone"]["bottleneck"] == pytest.approx(float(cka(z, f)), abs=1e-9)


def test_it_disturbs_nothing(watched, tmp_path):
    *_, model = watched
    _, alone = run(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), alone.state_dict().values(), strict=True))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_resumed_run_compares_with_the_first_start(watched, tmp_path):
    _, whole, *_ = watched
    first = RepresentationSimilarity(["backbone", "bottleneck"], samples=24, batch_size=10)
    trainer, _ = run(tmp_path, first, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = RepresentationSimilarity(["backbone", "bottleneck"], samples=24, batch_size=10)
    run(tmp_path, again, ckpt_path=tmp_path / "one.ckpt")
    assert [row["epoch"] for row in again.rows] == [-1, 0, 1]
    assert all(torch.equal(k, whole.start[d][n]) for d, layers in again.start.items() for n, k in layers.items())
    other = RepresentationSimilarity(["bottleneck"])
    with pytest.raises(uda.UDAError, match="other domains or layers"):
        run(tmp_path, other, ckpt_path=tmp_path / "one.ckpt")


class Convolutional(torch.nn.Module):
    """Images to feature maps, to tokens, to a vector."""

    def __init__(self):
        super().__init__()
        self.maps = torch.nn.Conv2d(1, 4, 3)
        self.tokens = torch.nn.Flatten(2)

    def forward(self, x):
        return self.tokens(self.maps(x)).mean(2)


def test_layers_inside_the_backbone(tmp_path):
    torch.manual_seed(0)
    data = uda.DataModule(TinyTask("images"), source="source", target="target", batch_size=8, epoch_steps=1)
    model = uda.UDA(Convolutional(), bottleneck=8)
    seen = RepresentationSimilarity(["backbone.maps", "backbone.tokens", "head"], samples=16)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        callbacks=[seen], default_root_dir=tmp_path, log_every_n_steps=1, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    assert set(seen.rows[-1]["layers"]["target"]) == {"backbone.maps", "backbone.tokens", "head"}


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (lambda: RepresentationSimilarity(["bottlneck"]), "'bottleneck'"),
        (lambda: RepresentationSimilarity(["plugins"]), "does not run once"),
        (lambda: RepresentationSimilarity(samples=3), "at least 4"),
    ],
)
def test_errors(tmp_path, callback, text):
    with pytest.raises(uda.UDAError, match=text):
        run(tmp_path, callback(), epochs=1)


@pytest.mark.slow
def test_on_the_command_line(tmp_path, monkeypatch):
    from pathlib import Path

    from uda.cli import main

    config = tmp_path / "watch.yaml"
    config.write_text(
        "trainer:\n  callbacks:\n    - class_path: RepresentationSimilarity\n"
        "      init_args: {layers: [bottleneck], samples: 32}\n"
    )
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).resolve().parents[2]
    code = main([
        "fit", "--config", str(root / "configs" / "digits_source_only.yaml"), "--config", str(config),
        "--trainer.max_epochs=1", "--data.epoch_steps=2", "--trainer.enable_progress_bar=false",
        "--run_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert code == 0
    rows = json.loads((tmp_path / "run" / "similarity.json").read_text())
    assert 0 < rows[-1]["start"]["handwritten"]["bottleneck"] < 1
