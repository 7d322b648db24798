"""The plugin gives what the adapter gives by itself."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from uda_testtime import TENT, Adapter
from uda_testtime.plugin import TestTime

import uda
from uda.testing import TinyTask, check_plugin


@pytest.mark.slow
def test_lifecycle():
    # several batches a pass: TENT's first prediction is made before its first update
    given = {"method": "TENT", "arguments": {"lr": 0.05}}
    check_plugin(TestTime, init_args=given, data_args={"eval_batch_size": 8}, ddp=False)


@pytest.mark.slow
@pytest.mark.parametrize("given", [
    {"method": "RMT", "arguments": {"warmup": 32, "batch_size": 16}, "source_samples": 32},
    {"method": "CoTTA", "arguments": {"views": 2}},
])  # fmt: skip
def test_lifecycle_of_methods_with_teachers(given):
    check_plugin(TestTime, init_args=given, data_args={"eval_batch_size": 8}, ddp=False)


@pytest.mark.slow
def test_lifecycle_of_a_method_that_needs_batchnorm_over_positions():
    arguments = {"lr": 0.05, "rate": 0.1, "capacity": 9, "every": 8, "epochs": 1, "batch_size": 16}
    given = {"method": "NOTE", "arguments": arguments, "source_samples": 32}
    check_plugin(
        TestTime, init_args=given, kind="images", backbone=partial(uda.nn.SmallCNN, 1, (4, 8)),
        data_args={"eval_batch_size": 8}, only=["lifecycle", "liveness", "checkpoint", "precision"],
    )  # fmt: skip


def test_same_as_the_adapter():
    task = TinyTask("features", 1)
    *source, target = task.domains()
    data = uda.data.DataModule(task, source=source, target=target, eval_batch_size=8, seed=0)
    torch.manual_seed(0)
    model = uda.UDA(uda.nn.MLP([8]), {"adapt": TestTime()}, bottleneck=4, **data.spec).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, logger=False, inference_mode=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    for _ in range(2):  # a second pass starts from the source
        found = torch.cat([o["probs"] for o in trainer.predict(model, data)])
        adapter = Adapter(nn.Sequential(model.backbone, model.bottleneck, model.head), TENT())
        alone = torch.cat([adapter(b["x"]).softmax(1) for b in data.predict_dataloader()[0]])
        assert torch.equal(found, alone)
    assert adapter.updates > 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_several_processes_and_inference_mode_are_refused(monkeypatch):
    data = uda.data.DataModule(TinyTask("features", 1), source="source", target="target", eval_batch_size=8, seed=0)
    model = uda.UDA(uda.nn.MLP([8]), {"adapt": TestTime()}, bottleneck=4, **data.spec).eval()
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing"), False)
    with pytest.raises(uda.UDAError, match="inference_mode=False"):
        L.Trainer(accelerator="cpu", devices=1, **off).predict(model, data)
    trainer = L.Trainer(accelerator="cpu", devices=1, inference_mode=False, **off)
    monkeypatch.setattr(L.Trainer, "world_size", property(lambda self: 2))
    with pytest.raises(uda.UDAError, match=r"'adapt' adapts to a stream and would drift apart.*devices=1"):
        trainer.predict(model, data)


def test_arguments_that_a_method_lacks_are_refused_by_name():
    for given in ({"method": "BNStatistics", "arguments": {"lr": 0.1}},
                  {"method": "LSA", "arguments": {"method": "BNStatistics", "arguments": {"lr": 0.1}}}):  # fmt: skip
        with pytest.raises(uda.UDAError, match=r"BNStatistics has no argument 'lr'\. It takes source_weight"):
            TestTime(**given)


def test_text_among_the_arguments_of_a_method_is_text():
    """``arguments`` is a free mapping: a word in it is no class name."""
    from uda.spelling import check_value, parameters

    hint = parameters(TestTime)[0]["arguments"]
    assert check_value(hint, {"optimizer": "adam", "lr": 0.1}, "here") == {"optimizer": "adam", "lr": 0.1}
