"""What leaves the owner of a source: nothing of any single sample."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from uda_sourcefree.handover import class_gaussians, handover, main, parser

import uda
from uda.testing import TinyTask

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False,
    "enable_model_summary": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Checkpoint and data of a source, by number of its rows."""
    folder, made = tmp_path_factory.mktemp("source"), {}

    def make(rows):
        if rows not in made:
            torch.manual_seed(0)
            task = TinyTask(rows=rows)
            data = uda.DataModule(task, source="source", target="target", batch_size=8, epoch_steps=8, seed=1)
            model = uda.UDA(uda.nn.MLP([8]), {}, bottleneck=8)
            trainer = L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET)
            trainer.fit(model, data)
            trainer.save_checkpoint(folder / f"{rows}.ckpt")
            made[rows] = str(folder / f"{rows}.ckpt"), data, model
        return made[rows]

    return make


def tensors(value, name=""):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for k, v in value.items():
            yield from tensors(v, f"{name}/{k}")
    elif isinstance(value, (list, tuple)):
        for i, v in enumerate(value):
            yield from tensors(v, f"{name}/{i}")


def test_gaussians_by_loops():
    draw = np.random.default_rng(0)
    f, y, p = draw.normal(size=(40, 3)), np.arange(40) % 2, np.arange(40) % 2
    p[:6] = 1 - p[:6]
    found = class_gaussians(torch.tensor(f), torch.tensor(y), torch.tensor(p), 2, 5)
    for c in range(2):
        own = [f[i] for i in range(40) if y[i] == p[i] == c]
        mean = sum(own) / len(own)
        cov = sum(np.outer(v - mean, v - mean) for v in own) / (len(own) - 1)
        np.testing.assert_allclose(found["means"][c], mean, rtol=1e-5)
        np.testing.assert_allclose(found["covariances"][c], cov, rtol=1e-4, atol=1e-6)
    with pytest.raises(uda.UDAError, match="class 1 has 1 samples"):
        class_gaussians(torch.tensor(f[:3]), torch.tensor([0, 0, 1]), torch.tensor([0, 0, 1]), 2, 2)


def test_no_sample_and_no_statistic_of_one_is_in_the_file(source, tmp_path):
    """Its tensors are weights and class statistics, of sizes without N; none of their rows is that of a sample."""
    path, data, model = source(48)
    torch.save(handover(path, data, least=3), tmp_path / "h.pt")
    file = torch.load(tmp_path / "h.pt", weights_only=True)
    assert set(file) == {"hyper_parameters", "state_dict", "preprocessing", "class_statistics", "contains"}
    allowed = {f"/state_dict/{k}" for k in model.state_dict()} | {
        "/class_statistics/means", "/class_statistics/covariances"
    }  # fmt: skip
    shapes = {name: tuple(t.shape) for name, t in tensors(file)}
    assert set(shapes) == allowed
    other, other_data, _ = source(72)
    assert shapes == {name: tuple(t.shape) for name, t in tensors(handover(other, other_data, least=3))}
    x = torch.cat([b["x"] for b in data.pool_dataloader("source")])
    batch = model.eval().batch(x, role="source")
    singles = [x, batch.features.detach(), batch.logits.detach(), batch.logits.detach().softmax(1)]
    for name, tensor in tensors(file):
        rows = tensor.float().reshape(-1, tensor.shape[-1]) if tensor.ndim else tensor.float().reshape(1, 1)
        for single in singles:
            if rows.shape[1] == single.shape[1]:
                assert float(torch.cdist(rows, single).min()) > 1e-4, name


def test_statistics_do_not_tell_the_order_of_samples():
    torch.manual_seed(0)
    f, y = torch.randn(60, 4, dtype=torch.double), torch.arange(60) % 3
    order = torch.randperm(60)
    one, other = class_gaussians(f, y, y, 3), class_gaussians(f[order], y[order], y[order], 3)
    for k in one:
        torch.testing.assert_close(one[k], other[k])


def test_weights_start_a_run(source, tmp_path):
    path, _, model = source(48)
    torch.save(handover(path), tmp_path / "h.pt")
    data = uda.DataModule(TinyTask(), target="target", batch_size=8, epoch_steps=1, seed=1)
    start = uda.UDA(uda.nn.MLP([8]), {"refine": "SHOT"}, bottleneck=8, init_from=str(tmp_path / "h.pt"))
    L.Trainer(**QUIET).validate(start, data, verbose=False)
    torch.testing.assert_close(start.head.linear.weight, model.head.linear.weight)
    assert "class_statistics" not in torch.load(tmp_path / "h.pt", weights_only=True)


def test_bad_input(source, tmp_path):
    path, data, _ = source(48)
    with pytest.raises(uda.UDAError, match=r"has \d+ samples: statistics of fewer than 100"):
        handover(path, data, least=100)
    (tmp_path / "x.ckpt").write_text("no checkpoint")
    with pytest.raises(uda.UDAError, match="cannot be read as a checkpoint"):
        handover(str(tmp_path / "x.ckpt"))
    file = torch.load(path, weights_only=True)
    file["state_dict"]["head.branches.0.weight"] = torch.zeros(2)
    torch.save(file, tmp_path / "branches.ckpt")
    with pytest.raises(uda.UDAError, match=r"changed the network.*'head.branches.0.weight'"):
        handover(str(tmp_path / "branches.ckpt"))
    both = uda.DataModule(TinyTask(sources=2), source=["source", "source2"], target="target")
    with pytest.raises(uda.UDAError, match="of one source"):
        handover(path, both)
    (tmp_path / "there.pt").touch()
    with pytest.raises(uda.UDAError, match="exists"):
        main(["export-source", path, "-o", str(tmp_path / "there.pt")])


def test_command(source, tmp_path, capsys):
    """It says what is in the file: the preprocessing too, which a run that names none takes from its data."""
    path, _, _ = source(48)
    assert main(["export-source", path, "-o", str(tmp_path / "h.pt")]) == 0
    said = capsys.readouterr().out
    assert "No sample of the source" in said
    assert "; no preprocessing." in said  # no config is at hand
    x, y = np.zeros((20, 8, 8)), np.zeros(20)
    np.savez(tmp_path / "d.npz", a_x=x, a_y=y, b_x=x, b_y=y)
    reader = f"{{class_path: Arrays, init_args: {{path: {tmp_path / 'd.npz'}, kind: images}}}}"
    (tmp_path / "c.yaml").write_text(f"data: {{reader: {reader}, source: a, target: b}}\n")
    assert main(["export-source", path, "-o", str(tmp_path / "c.pt"), "--config", str(tmp_path / "c.yaml")]) == 0
    assert "domains; preprocessing." in capsys.readouterr().out
    file = torch.load(tmp_path / "c.pt", weights_only=True)
    assert file["preprocessing"]["class_path"] == "uda.data.tensor_views.TensorViews"


def test_commands_of_the_page(source, tmp_path, capsys):
    """Those on the hand-over run as they stand there, with a checkpoint in the place of the page's."""
    page = Path(__file__).resolve().parents[3] / "docs" / "methods" / "sourcefree.md"
    lines = re.findall(r"^    uda (export-source .*)$", page.read_text(), re.M)
    assert len(lines) == 2
    for line in lines:
        words = shlex.split(line, comments=True)
        assert parser().parse_args(words[1:]).output == Path("source.pt")
    words = shlex.split(lines[0], comments=True)
    words[1], words[3] = source(48)[0], str(tmp_path / "source.pt")
    assert main(words) == 0
    file = torch.load(tmp_path / "source.pt", weights_only=True)
    assert file["contains"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bottleneck": 16}, "bottleneck of this run does not fit"),
        ({"head": "weight_norm"}, "head of this run does not fit"),
        ({"backbone": "identity"}, "backbone of this run does not fit"),
        ({"class_names": ["a", "c", "b"]}, "trained on classes"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(source, tmp_path, given, message):
    file = handover(source(48)[0])
    assert file["hyper_parameters"]["class_names"] == ["a", "b", "c"]
    file["hyper_parameters"] |= {k: v for k, v in given.items() if k == "class_names"}
    torch.save(file, tmp_path / "h.pt")
    given = {k: v for k, v in given.items() if k != "class_names"}
    arguments = {"backbone": uda.nn.MLP([8]), "bottleneck": 8, "init_from": str(tmp_path / "h.pt"), **given}
    model = uda.UDA(arguments.pop("backbone"), {"refine": "SHOT"}, **arguments)
    data = uda.DataModule(TinyTask(), target="target", batch_size=8, epoch_steps=1, seed=1)
    with pytest.raises(uda.UDAError, match=message):
        L.Trainer(max_epochs=1, num_sanity_val_steps=0, **QUIET).fit(model, data)
