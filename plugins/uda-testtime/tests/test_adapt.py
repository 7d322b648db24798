"""``uda adapt``: the same as the adapter in code and as ``uda test``; stops and goes on, bit for bit."""

from __future__ import annotations

import csv
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from uda_testtime import TENT, Adapter
from uda_testtime.domains import shifts_of
from uda_testtime.streams import GRADUAL

import uda
from uda.cli import main
from uda.testing import TinyTask


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A config and a checkpoint of a source model, which need not be trained."""
    folder = tmp_path_factory.mktemp("source")
    config = {
        "model": {
            "backbone": {"class_path": "uda.nn.MLP", "init_args": {"hidden": [8]}}, "bottleneck": 4,
            "plugins": {"adapt": {"class_path": "TestTime", "init_args": {"arguments": {"lr": 0.05}}}},
        },
        "data": {
            "reader": {"class_path": "uda.testing.TinyTask", "init_args": {"sources": 2}}, "source": "source",
            "target": "target", "eval_batch_size": 8,
        },
    }  # fmt: skip
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    data = uda.data.DataModule(TinyTask(sources=2), source="source", target="target")
    torch.manual_seed(0)
    model = uda.UDA(uda.nn.MLP([8]), bottleneck=4, **data.spec)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": {}}, folder / "source.ckpt")
    return folder, model.eval()


def rows(folder):
    with (folder / "predictions.csv").open() as file:
        return list(csv.DictReader(file))


def command(source, out, *more):
    folder = source[0]
    words = ["--config", str(folder / "tiny.yaml"), f"--model.init_from={folder / 'source.ckpt'}", "--batch_size", "8"]
    return main(["adapt", *words, "-o", str(out), *more])


def test_the_same_as_in_code_and_resumed(source, tmp_path):
    assert command(source, tmp_path / "whole") == 0
    _, model = source
    parts = OrderedDict((n, getattr(model, n)) for n in ("backbone", "bottleneck", "head"))
    adapter = Adapter(nn.Sequential(parts), TENT(lr=0.05))
    x = TinyTask(sources=2).read("target").inputs.fetch(torch.arange(48))
    probs = torch.cat([adapter(b).softmax(1) for b in x.split(8)])
    found = rows(tmp_path / "whole")
    assert [int(r["label"]) for r in found] == probs.argmax(1).tolist()
    assert [r["score"] for r in found] == [f"{p:.6f}" for p in probs.max(1).values.tolist()]
    told = json.loads((tmp_path / "whole" / "stream.json").read_text())
    y = TinyTask(sources=2).read("target").labels
    assert told["oracle_error"] == pytest.approx(100 * float((probs.argmax(1) != y).float().mean()))
    assert told["updates"] == 6
    assert command(source, tmp_path / "parts", "--stop_after", "2", "--save_every", "1") == 75
    assert len(rows(tmp_path / "parts")) == 16
    assert command(source, tmp_path / "parts") == 2  # it is used
    assert command(source, tmp_path / "parts", "--resume") == 0
    assert (tmp_path / "parts" / "predictions.csv").read_text() == (tmp_path / "whole" / "predictions.csv").read_text()
    states = [torch.load(tmp_path / n / "state.pt", weights_only=True)["adapter"] for n in ("whole", "parts")]
    assert all(torch.equal(p, q) for p, q in zip(*(s["parameters"] for s in states), strict=True))


def test_a_file_in_place_of_the_folder_is_refused(source, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert command(source, out) == 2
        assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err


def test_settings_and_shifts(source, tmp_path):
    more = ("--setting", "correlated", "--shifts", "source2", "target", "--limit", "9", "--batch_size", "1")
    assert command(source, tmp_path / "out", *more) == 0
    found = rows(tmp_path / "out")
    assert [r["shift"] for r in found] == ["source2"] * 9 + ["target"] * 9
    with (tmp_path / "out" / "batches.csv").open() as file:
        batches = list(csv.DictReader(file))
    assert len(batches) == 18
    assert {"oracle_online_error", "seconds", "updates", "rollbacks"} <= set(batches[0])


def test_a_config_may_hold_the_stream_and_the_command_line_wins(source, tmp_path):
    stream = "--model.plugins.adapt.stream={setting: correlated, shifts: [source2, target], limit: 9, batch_size: 4}"
    assert command(source, tmp_path / "out", stream, "--limit", "5") == 0  # batch_size is given there, too
    found = json.loads((tmp_path / "out" / "stream.json").read_text())
    assert (found["setting"], found["limit"], found["batch_size"]) == ("correlated", 5, 8)
    assert [r["shift"] for r in rows(tmp_path / "out")] == ["source2"] * 5 + ["target"] * 5


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--setting", "continal"], "continual"), (["--shifts", "targt"], "target"), (["--resume"], "no "),
        (["--model.plugins={}"], "TestTime"), (["--autocast", "float16"], "bfloat16"),
        (["--setting", "gradual"], "corruptions"), (["--model.init_from=none.ckpt"], "none.ckpt"),
        (["--corruptions", "fogg"], "Did you mean 'fog'"),
        (["--model.plugins.adapt.stream={seting: mixed}"], "Did you mean 'setting'"),
    ],
)  # fmt: skip
def test_errors_come_before_the_stream(source, tmp_path, capsys, more, told):
    assert command(source, tmp_path / "out", *more) == 2
    assert told in capsys.readouterr().err


def test_several_processes_are_refused(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command(source, tmp_path / "out") == 2
    assert "one process" in capsys.readouterr().err


def test_gradual_streams_go_through_the_severities(tmp_path):
    pytest.importorskip("corrupt_tta")
    x = torch.randint(0, 255, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(tmp_path / "two.npz", a_x=x, a_y=np.arange(12) % 3, b_x=x, b_y=np.arange(12) % 3)
    data = uda.DataModule(uda.data.Arrays(str(tmp_path / "two.npz"), kind="images"), "a", "b")
    shifts = shifts_of(data, corruptions=["contrast", "brightness"], gradual=True)
    assert [s.name for s in shifts] == [f"b/{c}/{n}" for c in ("contrast", "brightness") for n in GRADUAL]
    first, worst = (shifts[i].fetch(np.arange(12)) for i in (0, 4))
    assert worst.std() < first.std()  # contrast falls with the severity
    assert shifts[0].y.tolist() == shifts[4].y.tolist()
