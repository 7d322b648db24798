"""Universal methods against their equations in loops, and on targets with classes of their own."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from uda_universal import CMU, DANCE, DCC, PPOT, UAN, MemSPM, MLNet, OVANet, UniOT
from uda_universal.dance import entropy_separation, neighbourhood_entropy
from uda_universal.ovanet import OneVsAllHead, one_vs_all_losses, pair_entropy

import uda
from uda.testing import check_plugin, check_plugins_ddp

CASES = [
    (OVANet, {}), (DANCE, {"margin": 0.1}),
    (UAN, {"hidden": 16}), (CMU, {"hidden": 16, "members": 3}), (PPOT, {"warmup": 0.0}),
    (UniOT, {"clusters": 6, "fill": 24, "warmup": 1}), (MLNet, {}),
]


def softmax(z):
    e = np.exp(np.asarray(z) - np.max(z))
    return e / e.sum()


# ------------------------------------------------------------------------------------------------ equations


def test_one_vs_all_by_loops():
    draw = np.random.default_rng(0)
    z, y = 2 * draw.normal(size=(6, 2, 4)), draw.integers(0, 4, 6)
    positive = negative = certainty = 0.0
    for zi, c in zip(z, y, strict=True):
        q = [softmax([zi[0, k], zi[1, k]]) for k in range(4)]
        positive -= math.log(q[c][1]) / 6
        negative += max(-math.log(q[k][0]) for k in range(4) if k != c) / 6
        certainty -= sum(v * math.log(v) for pair in q for v in pair) / 24
    got = one_vs_all_losses(torch.tensor(z), torch.tensor(y))
    assert [float(v) for v in got] == pytest.approx([positive, negative], rel=1e-9)
    assert float(pair_entropy(torch.tensor(z))) == pytest.approx(certainty, rel=1e-9)
    one_hot = torch.nn.functional.one_hot(torch.tensor(y), 4).float()
    assert float(one_vs_all_losses(torch.tensor(z), one_hot)[0]) == pytest.approx(positive, rel=1e-9)


def test_only_the_hardest_negative_gets_a_gradient():
    z = torch.randn(1, 2, 5, requires_grad=True)
    one_vs_all_losses(z, torch.tensor([2]))[1].backward()
    touched = z.grad.abs().sum((0, 1)) > 0
    p = z.softmax(1)[0, 1].detach().clone()
    p[2] = -1
    assert touched.tolist() == (torch.arange(5) == p.argmax()).tolist()


def test_head_has_weight_vectors_of_length_one():
    torch.manual_seed(0)
    head, x = OneVsAllHead(3, 4, unit=True), torch.randn(5, 3)
    for k in range(4):
        for channel in (0, 1):
            w = head.weight[channel * 4 + k]
            torch.testing.assert_close(head(x)[:, channel, k], x @ (w / w.norm()))


def test_neighbourhood_entropy_by_loops():
    draw = np.random.default_rng(1)
    f, w, m = draw.normal(size=(3, 4)), draw.normal(size=(2, 4)), draw.normal(size=(6, 4))
    index, filled, t = [4, 0, 2], [True, True, True, True, True, False], 0.5

    def cosine(a, b):
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    total = 0.0
    for i in range(3):
        near = [cosine(f[i], c) / t for c in w]
        near += [cosine(f[i], m[j]) / t for j in range(6) if filled[j] and j not in index]
        near += [cosine(f[i], f[j]) / t for j in range(3) if j != i]
        p = softmax(near)
        total -= (p * np.log(p)).sum() / 3
    arrays = [torch.tensor(v, requires_grad=True) for v in (f, w, m)]
    got = neighbourhood_entropy(*arrays, torch.tensor(index), torch.tensor(filled), t)
    assert float(got.detach()) == pytest.approx(total, rel=1e-9)
    got.backward()
    assert all(v.grad.isfinite().all() for v in arrays[:2])


def test_entropy_separation_by_loops_and_its_dead_zone():
    z = torch.tensor([[5.0, 0, 0, 0], [0.1, 0, 0, 0], [2.2, 0.0, 0.3, 0.0]], dtype=torch.double, requires_grad=True)
    rho = math.log(4) / 2
    h = [-(p := softmax(row)) @ np.log(p) for row in z.detach().numpy()]
    assert float(entropy_separation(z, 0.5).detach()) == pytest.approx(-np.mean([max(abs(v - rho), 0.5) for v in h]))
    entropy_separation(z, 0.5).backward()
    assert abs(h[2] - rho) < 0.5
    assert z.grad[2].abs().sum() == 0
    step = (z - 0.1 * z.grad).detach().numpy()
    after = [-(p := softmax(row)) @ np.log(p) for row in step]
    assert after[0] < h[0]
    assert after[1] > h[1]


# ------------------------------------------------------------------------------------------------ what they do


def task(**options):
    """Known classes 0 to 2, source-private 3, target-private 4 and 5."""
    return uda.DataModule(
        uda.data.Generated("blobs", classes=6, n=360, features=8, noise=0.3, seed=4), "source", "target", seed=0,
        setting="universal", classes={"known": 3, "source_private": 1, "target_private": 2}, batch_size=32,
        epoch_steps=20, **options,
    )  # fmt: skip


def fitted(plugins, epochs=5, **model_options):
    torch.manual_seed(0)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    model, data = uda.UDA("mlp", plugins, bottleneck=16, **model_options), task()
    trainer.fit(model, data)
    return model, data, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_ovanet_finds_unknown_classes():
    model, _, figures = fitted({"align": OVANet()})
    assert figures["oracle/h_score"] > 0.4
    assert figures["oracle/auroc"] > 0.8
    other, _, _ = fitted({"align": OVANet(entropy_weight=0.0)})
    assert not torch.allclose(next(model.head.parameters()), next(other.head.parameters()), atol=1e-5)


@pytest.mark.slow
def test_dance_moves_entropies_away_from_the_threshold():
    undecided = []
    for weight in (0.0, 0.3):
        model, data, figures = fitted({"align": DANCE(weight=weight, margin=None)}, head="cosine")
        model.eval()
        with torch.no_grad():
            batches = [model.batch(b["x"], index=b["index"]) for b in data.val_dataloader()[1]]
            h = torch.cat([model.predict_batch(b).unknown_score for b in batches])
        undecided.append(float(((h - 0.5).abs() < 1 / 6).float().mean()))
        assert figures["oracle/os_star"] > 0.9
    assert undecided[1] < undecided[0] / 2


def test_memory_holds_the_target_by_index():
    model, _, _ = fitted({"align": DANCE()}, epochs=2, head="cosine")
    memory = model.plugins["align"].memory
    assert len(memory) == model.sizes["target"]
    norms = memory.features.norm(dim=1)
    torch.testing.assert_close(norms, memory.filled.float())


@pytest.mark.parametrize("method", [OVANet, DANCE, MLNet])
def test_private_labels_of_the_target_change_no_weight(method, tmp_path):
    """Whatever the target-private samples are called: the same weights, bit for bit."""
    draw = np.random.default_rng(0)
    y = np.arange(120) % 6
    x = draw.normal(size=(120, 5)) + 2 * draw.normal(size=(6, 5))[y]
    ends = []
    for private in (y, np.where(y > 3, draw.integers(4, 6, 120), y), np.where(y > 3, 9 - y, y)):
        np.savez(tmp_path / "d.npz", a_x=x, a_y=np.where(y > 3, y - 4, y), b_x=x + 0.5, b_y=private)
        data = uda.DataModule(
            uda.data.Arrays(str(tmp_path / "d.npz"), kind="features"), "a", "b", seed=0, batch_size=16, epoch_steps=4,
            classes={"known": ["0", "1", "2"], "source_private": ["3"], "target_private": ["4", "5"]},
            allow_missing_classes=True,
        )  # fmt: skip
        torch.manual_seed(0)
        model = uda.UDA("mlp", {"align": method(), "reject": uda.Reject()}, bottleneck=8, head="cosine")
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        L.Trainer(max_epochs=2, accelerator="cpu", devices=1, **dict.fromkeys(off, False)).fit(model, data)
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
    for other in ends[1:]:
        assert all(torch.equal(v, other[k]) for k, v in ends[0].items())


def test_bad_arguments():
    for make in (
        lambda: OVANet(weight=-1.0), lambda: OVANet(threshold=1.0), lambda: DANCE(temperature=0.0),
        lambda: DANCE(margin=-0.1),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()


# ------------------------------------------------------------------------------------------------ lifecycle


def test_plugin():
    check_plugin(OVANet, ddp=False)


@pytest.mark.slow
def test_dance_plugin():
    check_plugin(DANCE, init_args={"margin": 0.1}, ddp=False)


@pytest.mark.slow
def test_under_two_processes():
    clustered = [
        (DCC, {"refresh_every": 2}),
        (MemSPM, {"refresh_every": 2, "items": 6, "subs": 2, "top": 3}),
    ]
    check_plugins_ddp([(cls, {"init_args": options}) for cls, options in [*CASES, *clustered]])
