"""The pieces of CoDAG against formulas written out again, and its plugin."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from uda_testtime.continual import randmix
from uda_testtime.continual.codag import CoDAG, distillation
from uda_testtime.continual.exemplars import herding, with_domain
from uda_testtime.continual.measures import sequence_measures
from uda_testtime.continual.noisy_labels import noisy_label_loss, other_labels, phase_of

import uda
from uda.errors import UDAError
from uda.testing import TinyTask, check_plugin


@pytest.fixture
def files(tmp_path):
    """Labels of the tiny task's target, and a memory of its source."""
    task = TinyTask()
    source = task.read("source")
    torch.save({"y": torch.arange(task.rows) % 3}, tmp_path / "labels.pt")
    torch.save({"x": source.inputs.x[:9], "y": source.labels[:9]}, tmp_path / "memory.pt")
    return {"labels": str(tmp_path / "labels.pt"), "memory": str(tmp_path / "memory.pt")}


def test_measures_are_means_over_parts_of_the_matrix():
    a, names = np.random.default_rng(0).random((4, 4)), ["source", "a", "b", "c"]
    rows = [dict(zip(names, row, strict=True)) for row in a.tolist()]
    found = sequence_measures(rows, names[1:], "source")
    assert found["tda"] == {n: a[i, i] for i, n in enumerate(names) if i}
    assert found["tdg"] == pytest.approx({n: np.mean([a[s, i] for s in range(i)]) for i, n in enumerate(names) if i})
    assert found["fa"] == pytest.approx(
        {n: np.mean([a[s, i] for s in range(i + 1, 4)]) for i, n in enumerate(names) if i < 3}
    )
    three = [np.mean(list(found[m].values())) for m in ("tda", "tdg", "fa")]
    assert found["mean"] == pytest.approx({"tda": three[0], "tdg": three[1], "fa": three[2], "all": np.mean(three)})
    rows = [{"a": 0.5, "b": None}, {"a": 0.75, "b": None}]
    found = sequence_measures(rows, ["a", "b"])
    assert found["mean"] == {"tda": 0.75, "tdg": 0.5, "fa": None, "all": None}


@pytest.mark.parametrize("phase", ["negative", "selective", "positive"])
def test_noisy_label_losses_are_their_formulas(phase):
    z = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    y, other = torch.arange(20) % 4, (torch.arange(20) + 1 + torch.arange(20) // 7) % 4
    p, total = np.exp(z.numpy()) / np.exp(z.numpy()).sum(1, keepdims=True), []
    for i in range(20):
        own, wrong = p[i, int(y[i])], p[i, int(other[i])]
        if phase == "negative" or (phase == "selective" and own > 1 / 4):
            total.append(-np.log(1 - wrong))
        if phase == "positive" and own > 0.5:
            total.append(-np.log(own))
    assert 0 < len(total) <= 20
    assert float(noisy_label_loss(z, y, other, phase)) == pytest.approx(np.mean(total))
    wrong = (20.0 * F.one_hot((y + 1) % 4, 4)).requires_grad_()  # no label is believed
    none = noisy_label_loss(wrong, y, other, "positive")
    assert none.item() == 0
    assert not torch.autograd.grad(none, wrong)[0].any()


def test_phases_and_other_labels():
    found = [phase_of(t, (0.25, 0.5)) for t in (0, 0.24, 0.25, 0.5, 1)]
    assert found == ["negative", "negative", "selective", "positive", "positive"]
    torch.manual_seed(0)
    y = torch.arange(3000) % 3
    other = other_labels(y, 3)
    assert not (other == y).any()
    assert torch.bincount((other - y) % 3).tolist() == pytest.approx([0, 1500, 1500], abs=150)


def test_distillation_is_the_divergence_from_the_old_model():
    old, new = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    p, q = (np.exp(v.numpy()) / np.exp(v.numpy()).sum(1, keepdims=True) for v in (old, new))
    assert float(distillation(old, new)) == pytest.approx(float((p * np.log(p / q)).sum(1).mean()))


def test_herding_follows_the_mean():
    f = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    unit = f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True)
    chosen = []
    for _ in range(5):
        gap = {i: np.linalg.norm(unit[[*chosen, i]].mean(0) - unit.mean(0)) for i in range(12) if i not in chosen}
        chosen.append(min(gap, key=gap.get))
    assert herding(f, 5).tolist() == chosen
    assert len(herding(f, 99)) == 12


def test_a_memory_keeps_the_first_of_each_class_and_domain():
    x, y = torch.arange(40.0)[:, None], torch.arange(40) % 2
    f = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    one = with_domain(None, f, y, lambda rows: x[rows], 16, 2)
    assert torch.bincount(one["y"]).tolist() == [8, 8]
    two = with_domain(one, f, y, lambda rows: 100 + x[rows], 16, 2)
    assert [(two["y"][two["domain"] == d]).bincount().tolist() for d in (0, 1)] == [[4, 4], [4, 4]]
    kept = one["x"][one["rank"] < 4].flatten().tolist()
    assert two["x"][two["domain"] == 0].flatten().tolist() == kept


def test_randmix_mixes_an_image_with_random_codes_of_it():
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))  # smaller than all kernels: colour alone
    found, g = randmix.randmix_view(x, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(1)
    signed = (2 * x - 1).numpy()
    noisy = signed + 0.001 * torch.randn(x.shape, generator=g).numpy()
    weight = (2 * torch.rand(3, 3, 1, 1, generator=g) - 1).numpy()[:, :, 0, 0] / 3**0.5
    bias = (2 * torch.rand(3, generator=g) - 1).numpy() / 3**0.5
    colour = np.einsum("oc,bchw->bohw", weight, noisy) + bias[:, None, None]
    code = np.tanh(colour * (torch.rand(x.shape, generator=g) >= 0.2).numpy() / 0.8)
    w = torch.randn(2, generator=g).numpy()
    assert np.allclose(found.numpy(), 1 / (1 + np.exp(-(w[0] * signed + w[1] * code) / w.sum())), atol=1e-5)
    big = torch.rand(4, 1, 20, 20)
    one, two = (randmix.randmix_view(big, torch.Generator().manual_seed(s)) for s in (0, 1))
    assert one.shape == big.shape
    assert 0 <= one.min() <= one.max() <= 1
    assert not torch.allclose(one, two)
    restyled = randmix._restyled(torch.rand(2, 3, 9, 9), torch.Generator().manual_seed(0))
    assert restyled.mean((2, 3)).std() > 0.05  # each sample and channel has a shift of its own


@pytest.mark.slow
def test_the_stage_of_the_source():
    check_plugin(CoDAG, kind="images", ddp=False)


@pytest.mark.slow
def test_a_later_stage(files):
    report = check_plugin(CoDAG, init_args={**files, "phases": [0.0, 0.0], "threshold": 0.0}, ddp=False)
    assert set(report.objectives) == {"labels", "distillation"}


def trained(plugins):
    data = uda.DataModule(TinyTask("images"), source="source", target="target", batch_size=8, epoch_steps=3, seed=0)
    torch.manual_seed(0)
    model = uda.UDA(uda.nn.SmallCNN(1, (4, 8)), plugins, bottleneck=4)
    L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
    return {k: v for k, v in model.state_dict().items() if not k.startswith("plugins")}


def test_without_weight_the_stage_of_the_source_is_source_only():
    plain, off, on = trained({}), trained({"g": CoDAG(weight=0)}), trained({"g": CoDAG()})
    assert all(torch.equal(v, off[k]) for k, v in plain.items())
    assert not all(torch.equal(v, on[k]) for k, v in plain.items())


@pytest.mark.parametrize(
    ("given", "told"),
    [({"weight": -1.0}, "0 or more"), ({"phases": (0.5, 0.2)}, "ascending"), ({"memory": "m.pt"}, "memory without"),
     ({"threshold": 1.0}, "threshold")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(given, told):
    with pytest.raises(UDAError, match=told):
        CoDAG(**given)


def test_files_that_do_not_fit_are_refused(files, tmp_path):
    torch.save({"y": torch.zeros(3)}, tmp_path / "few.pt")
    torch.save({"x": torch.zeros(2, 5), "y": torch.zeros(2)}, tmp_path / "other.pt")
    for given, told in (
        ({"labels": "none.pt"}, "no file"), ({"labels": str(tmp_path / "few.pt")}, "3 labels"),
        ({"labels": files["memory"], "memory": str(tmp_path / "other.pt")}, "9 labels"),
        ({"labels": files["labels"], "memory": str(tmp_path / "other.pt")}, "exemplars"),
        ({"labels": files["labels"], "memory": files["labels"]}, "lacks x"),
    ):  # fmt: skip
        data = uda.DataModule(TinyTask(), source="source", target="target", batch_size=8, epoch_steps=1, seed=0)
        model = uda.UDA("identity", {"g": CoDAG(**given)}, bottleneck=4)
        with pytest.raises(Exception, match=told):
            L.Trainer(
                max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, num_sanity_val_steps=0,
            ).fit(model, data)  # fmt: skip
