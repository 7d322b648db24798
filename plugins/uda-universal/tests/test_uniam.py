"""UniAM: attention, sparse codes and residuals against loops, on a tiny vision transformer."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from uda_universal.uniam import UniAM, attention_rows, class_residuals, commonness, last_attention, sparse_codes

import uda
from uda.testing import check_plugin, check_plugins_ddp
from uda.testing.task import TinyTask

TINY = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}


def vit():
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return uda.nn.Timm("vit_tiny_patch16_224", in_chans=1, model_kwargs=TINY)


def test_attention_is_that_of_the_block():
    net = vit().eval()
    block, x, seen = last_attention(net), torch.randn(3, 1, 8, 8), []
    fused = block.fused_attn
    got = attention_rows(net, x)
    assert block.fused_attn is fused
    assert not block.qkv._forward_hooks
    block.fused_attn = False
    block.attn_drop.register_forward_hook(lambda layer, args, out: seen.append(out))
    net(x)
    a = seen[0][:, :, 0, 1:]
    expected = (a / a.sum(2, keepdim=True)).flatten(1)
    torch.testing.assert_close(got, expected / expected.norm(dim=1, keepdim=True))


def test_sparse_codes_are_stationary_and_residuals_by_loops():
    draw = np.random.default_rng(0)
    d, a = (torch.tensor(draw.normal(size=s)) for s in ((6, 10), (4, 10)))
    d, a = d / d.norm(dim=1, keepdim=True), a / a.norm(dim=1, keepdim=True)
    c = sparse_codes(a, d, eta=0.1, iterations=2000)
    gradient = (c @ d - a) @ d.T
    assert (c == 0).any()
    assert float((gradient + 0.1 * c.sign())[c != 0].abs().max()) < 1e-6
    assert float(gradient[c == 0].abs().max()) <= 0.1 + 1e-6
    r = class_residuals(a, c, d, 3)
    for i in range(4):
        for k in range(3):
            left = a[i] - sum(c[i, j] * d[j] for j in (2 * k, 2 * k + 1))
            assert float(r[i, k]) == pytest.approx(float(left.norm()))
    assert commonness(torch.tensor([[1.0, 1.0], [0.2, 0.8]])).tolist() == pytest.approx([0.0, 0.75])


def test_needs_a_vision_transformer():
    with pytest.raises(uda.UDAError, match="vision transformer"):
        last_attention(uda.nn.SmallCNN(1, (4, 8)))
    for make in (lambda: UniAM(atoms=0), lambda: UniAM(quantile=0.0)):
        with pytest.raises(uda.UDAError):
            make()


def test_without_a_quantile_the_latest_target_samples_are_cut_in_two():
    plugin = UniAM(quantile=None, hidden=8, atoms=1)
    plugin.key, plugin.dictionary = "align", uda.nn.Bank(2, rows=(3,))
    for name, value in (("seen", torch.ones(2, dtype=torch.long)), ("limit", torch.zeros(()))):
        plugin.register_buffer(name, value)
    plugin.register_buffer("recent", torch.full((2048,), torch.nan))
    plugin.before_evaluation(None)
    assert float(plugin.limit) == 0  # nothing is unknown yet
    rows, y = torch.eye(3)[:2], torch.tensor([0, 1])
    for w_t in (torch.tensor([0.1, 0.2]), torch.tensor([0.9, 0.8])):
        cache = {"align": (rows, torch.tensor([0.5, 0.5]), w_t)}
        plugin.after_step(
            SimpleNamespace(
                target=SimpleNamespace(cache=cache), pooled={"y": y}.get, model=SimpleNamespace(global_rank=0)
            )
        )
    plugin.before_evaluation(None)
    assert float(plugin.limit) == pytest.approx(0.5)
    assert plugin.recent[:4].tolist() == pytest.approx([0.9, 0.8, 0.1, 0.2])  # the latest first


@pytest.mark.slow
def test_a_fit_fills_the_dictionary_and_trains():
    ends = []
    for weight in (0.0, 1.0):
        model = uda.UDA(
            vit(), {"align": UniAM(weight=weight, separation=weight, hidden=16, atoms=2, iterations=5)}, bottleneck=8
        )
        data = uda.DataModule(TinyTask("images"), source="source", target="target", batch_size=16, epoch_steps=8)
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        L.Trainer(max_epochs=2, accelerator="cpu", devices=1, **dict.fromkeys(off, False)).fit(model, data)
        ends.append(model)
    plugin = ends[1].plugins["align"]
    assert plugin.dictionary.filled.all()
    assert 0 < float(plugin.limit) < 1
    torch.testing.assert_close(plugin.dictionary.rows.norm(dim=1), torch.ones(len(plugin.dictionary)))
    assert not torch.equal(*(next(m.backbone.parameters()) for m in ends))
    x = next(iter(data.val_dataloader()[1]))["x"]
    ends[1].eval()
    with torch.no_grad():
        found = ends[1].predict_batch(ends[1].batch(x))
    torch.testing.assert_close(found.unknown, found.unknown_score > 1 - plugin.limit)


# ------------------------------------------------------------------------------------------------ lifecycle

CHECKED = {
    "init_args": {"hidden": 8, "atoms": 1, "iterations": 5}, "kind": "images",
    "backbone": partial(uda.nn.Timm, "vit_tiny_patch16_224", in_chans=1, model_kwargs=TINY),
}  # fmt: skip


@pytest.mark.slow
def test_plugin():
    pytest.importorskip("timm")
    report = check_plugin(UniAM, ddp=False, **CHECKED)
    assert {"liveness", "resume", "precision"} <= set(report.passed)


@pytest.mark.slow
def test_under_two_processes():
    pytest.importorskip("timm")
    check_plugins_ddp([(UniAM, CHECKED)])
