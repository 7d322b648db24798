"""Multi-source-free methods against their equations in loops, and a run from checkpoints with no source at hand."""

from __future__ import annotations

import math
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from uda_multisource import DECISION, MSFDA, SMUDA, CAiDA
from uda_multisource.caida import anchor_labels, class_relations
from uda_multisource.decision import joint_centroid_labels
from uda_multisource.experts import ExpertHead, ExpertInput, read
from uda_multisource.msfda import aggregate, masked_information, prototype_probs
from uda_multisource.smuda import class_draws, gaussian_factors
from uda_sourcefree.handover import handover, network

import uda
from uda.testing import TinyTask, check_plugin, check_plugins_ddp

METHODS = [DECISION, CAiDA, MSFDA, SMUDA]


def source_model(path, number=1, steps=10, backbone=None, **options):
    """Checkpoint of a small model of one source of the tiny task."""
    torch.manual_seed(number)
    task = TinyTask("features", 2)
    name = task.domains()[number - 1]
    given = {"bottleneck": 8, "head": "weight_norm", **options}
    model = uda.UDA(backbone or uda.nn.MLP([8]), {}, **given)
    data = uda.DataModule(task, source=name, target="target", batch_size=8, epoch_steps=steps, seed=1)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(model, data)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    paths = []
    for i in (1, 2):
        path, task = source_model(folder / f"s{i}.ckpt", i), TinyTask("features", 2)
        data = uda.DataModule(task, source=task.domains()[i - 1], target="target", seed=1)
        torch.save(handover(path, data, least=3), path)
        paths.append(path)
    return paths


def target_model(plugin, **options):
    return uda.UDA("identity", {"refine": plugin}, bottleneck=0, num_classes=3, class_names=["a", "b", "c"],
                   input_shape=[6], sizes={"target": 48}, target_name="target", **options)  # fmt: skip


# ------------------------------------------------------------------------------------------------ equations


def test_joint_centroids_by_loops():
    draw = np.random.default_rng(0)
    f, z, w = draw.normal(size=(15, 2, 4)), draw.normal(size=(15, 2, 3)) * 2, np.array([0.3, 0.7])
    features, centres = np.zeros((15, 5)), np.zeros((3, 5))
    for i in range(2):
        unit = np.concatenate([f[:, i], np.ones((15, 1))], 1)
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        weight = np.exp(z[:, i]) / np.exp(z[:, i]).sum(1, keepdims=True)
        for _ in range(2):
            own = np.stack([sum(weight[n, c] * unit[n] for n in range(15)) / weight[:, c].sum() for c in range(3)])
            labels = [max(range(3), key=lambda c: v @ own[c] / np.linalg.norm(own[c])) for v in unit]
            weight = np.eye(3)[labels]
        features, centres = features + w[i] * unit, centres + w[i] * own
    expected = [min(range(3), key=lambda c: np.linalg.norm(v - centres[c])) for v in features]
    assert joint_centroid_labels(torch.tensor(f), torch.tensor(z), torch.tensor(w)).tolist() == expected


def test_anchors_by_loops():
    draw = np.random.default_rng(2)
    f, p, mix = draw.normal(size=(20, 4)), draw.dirichlet(np.ones(3), 20), draw.uniform(0.4, 1.1, 20)
    unit = np.concatenate([f, np.ones((20, 1))], 1)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)

    def cosines(x, weight):
        own = [sum(w[c] * v for w, v in zip(weight, x, strict=True)) for c in range(3)]
        return np.array([[v @ m / np.linalg.norm(v) / np.linalg.norm(m) for m in own] for v in x])

    def surest(values):
        lead = [sorted(v)[-1] - sorted(v)[-2] for v in values]
        return set(np.argsort(lead)[-8:])

    first = cosines(unit, p)
    labels, anchors = first.argmax(1), surest(first) | surest(p)
    moved = []
    for i in range(20):
        near = max((j for j in anchors if j != i), key=lambda j: unit[i] @ unit[j])
        moved.append(mix[i] * unit[i] + (1 - mix[i]) * unit[near])
    expected = cosines(np.array(moved), np.eye(3)[labels]).argmax(1)
    assert anchor_labels(torch.tensor(f), torch.tensor(p), torch.tensor(mix), 0.4).tolist() == expected.tolist()
    assert expected.tolist() != labels.tolist()


def test_relations_by_loops():
    torch.manual_seed(1)
    z, y = torch.randn(7, 3, 4), torch.tensor([0, 0, 2, 2, 2, 0, 2])
    total = 0.0
    for k in (0, 2):
        p = [z[y == k, i].mean(0).softmax(0) for i in range(3)]
        total += sum(float((a * (a / b).log()).sum()) for a in p for b in p) / 3
    assert float(class_relations(z, y)) == pytest.approx(total / 2, rel=1e-5)
    assert float(class_relations(z[:, :1].expand(-1, 3, -1), y)) == pytest.approx(0, abs=1e-6)


def test_prototypes_by_loops():
    draw = np.random.default_rng(0)
    f, z = draw.normal(size=(12, 3)), draw.normal(size=(12, 4)) * 2
    z[:, 3] = -50  # a class that nobody has
    labels = z.argmax(1)
    for _ in range(2):
        p = np.zeros((12, 4))
        for k in set(labels):
            centre = f[labels == k].mean(0)
            p[:, k] = [math.exp(-((v - centre) ** 2).sum() / 3.0) for v in f]
        p /= p.sum(1, keepdims=True)
        labels = p.argmax(1)
    np.testing.assert_allclose(prototype_probs(torch.tensor(f), torch.tensor(z), 1.5), p, rtol=1e-6)


def test_aggregation_prefers_the_certain_and_even_expert():
    torch.manual_seed(0)
    y = torch.arange(30) % 3
    good = 6.0 * F.one_hot(y, 3)
    collapsed = torch.tensor([6.0, 0, 0]).expand(30, 3)
    unsure = 0.1 * torch.randn(30, 3)
    w = aggregate(torch.stack([good, collapsed, unsure], 1), 300)
    assert float(w.sum()) == pytest.approx(1)
    assert w.argmax() == 0
    assert w[0] > 0.9
    assert aggregate(torch.stack([good, good], 1), 5).tolist() == pytest.approx([0.5, 0.5])
    logits, mask = torch.randn(6, 3), torch.tensor([1.0, 0, 1, 1, 0, 0])
    p = logits[[0, 2, 3]].softmax(1)
    value = -(p * p.log()).sum(1).mean() + (p.mean(0) * p.mean(0).log()).sum()
    assert float(masked_information(logits, mask)) == pytest.approx(float(value), rel=1e-5)
    assert float(masked_information(logits, torch.zeros(6))) == 0


def test_head_joins_logits_or_probabilities():
    torch.manual_seed(0)
    heads = [torch.nn.Linear(2, 3), torch.nn.Linear(4, 3)]
    x = torch.randn(5, 6)
    for mix in ("logits", "probs"):
        head = ExpertHead(heads, [2, 4], mix)
        head.mixture.data = torch.tensor([0.0, math.log(3.0)])
        one, two = heads[0](x[:, :2]), heads[1](x[:, 2:])
        if mix == "logits":
            torch.testing.assert_close(head(x), 0.25 * one + 0.75 * two)
        else:
            torch.testing.assert_close(head(x).exp(), 0.25 * one.softmax(1) + 0.75 * two.softmax(1))


def test_inputs_of_an_expert():
    x = torch.rand(2, 3, 8, 8)
    look = ExpertInput(size=4, channels=1, mean=0.5, std=0.25)
    assert look(x).shape == (2, 1, 4, 4)
    grey = F.interpolate(x.mean(1, keepdim=True), (4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(look(x), (grey - 0.5) / 0.25)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([1.0, 2.0, 4.0])
    coloured = ExpertInput(mean=mean.tolist(), std=std.tolist())(x)
    torch.testing.assert_close(coloured, (x - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(ExpertInput(mean=0.5, std=2.0)(torch.ones(2, 6)), torch.full((2, 6), 0.25))
    assert ExpertInput()(x) is x


def test_draws_of_the_classes():
    """As many of each class, with its mean and covariance."""
    torch.manual_seed(0)
    a = torch.randn(2, 3, 3)
    covariances, means = a @ a.mT, 10.0 * torch.eye(3)[:2]
    factors = gaussian_factors(covariances, 1e-6)
    torch.testing.assert_close(factors @ factors.mT, covariances, rtol=1e-3, atol=1e-4)
    drawn = class_draws(means, factors, 40000)
    own = torch.cdist(drawn, means).argmin(1)
    assert abs(int((own == 0).sum()) - 20000) < 200
    for c in range(2):
        torch.testing.assert_close(drawn[own == c].mean(0), means[c], rtol=0.05, atol=0.1)
        torch.testing.assert_close(torch.cov(drawn[own == c].T), covariances[c], rtol=0.1, atol=0.2)
    flat = torch.zeros(1, 4, 4)  # fewer samples than features: rank deficient
    assert gaussian_factors(flat).isfinite().all()


def test_distance_to_the_gaussians_falls(checkpoints):
    plugin = SMUDA(checkpoints, entropy=0.0)
    model = target_model(plugin)
    torch.manual_seed(0)
    x = torch.rand(40, 6) * 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    values = []
    for _ in range(25):
        step = uda.Step(model, {"target": {"x": x, "index": torch.arange(40)}}, 0.5, 0, 0)
        loss = plugin.refine_classifier(step)["distance"]
        values.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


# ------------------------------------------------------------------------------------------------- networks


def test_network_is_that_of_the_sources(checkpoints):
    plugin = DECISION(checkpoints)
    model = target_model(plugin).eval()
    x = torch.randn(4, 6)
    sources = []
    for c in checkpoints:
        architecture, state, _ = read(c, "")
        sources.append(network(architecture).eval())
        sources[-1].load_state_dict(state)
    torch.testing.assert_close(model(x), sum(s(x) for s in sources) / 2)
    assert model.feature_dim == 16
    assert not any(p.requires_grad for h in model.head.heads for p in h.parameters())
    assert model.head.mixture.requires_grad
    head = model.head
    plugin.build(model)
    assert model.head is head
    assert not target_model(MSFDA(checkpoints)).head.mixture.requires_grad


def test_domain_objective_has_exchanged_labels_for_the_features(checkpoints):
    plugin = MSFDA(checkpoints)
    target_model(plugin)
    torch.manual_seed(0)
    f, mask = torch.randn(6, 16, requires_grad=True), torch.tensor([1.0, 1, 0, 0, 0, 1])
    loss = plugin.domain(f, mask)
    net = plugin.discriminator
    got = torch.autograd.grad(loss, [f, *net.parameters()])
    leaf = f.detach().clone().requires_grad_()
    p = net(leaf).squeeze(1).sigmoid()
    on, off = mask.bool(), ~mask.bool()
    fool = -((1 - p[on]).log().mean() + p[off].log().mean()) / 2
    tell = -(p[on].log().mean() + (1 - p[off]).log().mean()) / 2
    assert float(loss.detach()) == pytest.approx(float((fool + tell).detach()), rel=1e-5)
    torch.testing.assert_close(got[0], torch.autograd.grad(fool, leaf, retain_graph=True)[0])
    for ours, theirs in zip(got[1:], torch.autograd.grad(tell, list(net.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_target_without_labels_has_the_classes_of_the_models(checkpoints, tmp_path):
    np.savez(tmp_path / "t.npz", t_x=np.random.default_rng(0).normal(size=(20, 6)).astype("float32"))
    model = uda.UDA("identity", {"refine": DECISION(checkpoints)}, bottleneck=0, scores=[])
    data = uda.DataModule(uda.data.Arrays(str(tmp_path / "t.npz"), kind="features"), None, "t", batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    L.Trainer(max_epochs=1, limit_train_batches=1, accelerator="cpu", devices=1, **quiet).fit(model, data)
    assert model.class_names == ["a", "b", "c"]


@pytest.mark.parametrize("cls", [METHODS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_a_run_without_sources(cls, checkpoints, tmp_path):
    """Adapts from the checkpoints alone, and what it saves is loaded when they are gone."""
    here = [shutil.copy(c, tmp_path / f"{i}.ckpt") for i, c in enumerate(checkpoints)]
    task = TinyTask("features", 2)
    model = uda.UDA("identity", {"refine": cls([str(c) for c in here])}, bottleneck=0)
    data = uda.DataModule(task, target="target", batch_size=16, epoch_steps=6, seed=1)
    trainer = L.Trainer(max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False,
                        enable_checkpointing=False, enable_model_summary=False, num_sanity_val_steps=0)  # fmt: skip
    trainer.fit(model, data)
    if cls is MSFDA:
        assert 0 < int(model.plugins["refine"].first) <= 48
    trainer.save_checkpoint(tmp_path / "adapted.ckpt")
    for c in here:
        c.unlink() if hasattr(c, "unlink") else (tmp_path / c).unlink()
    again = uda.UDA.load_from_checkpoint(tmp_path / "adapted.ckpt", map_location="cpu", weights_only=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


# ------------------------------------------------------------------------------------------------ bad input


def test_bad_checkpoints_are_refused(checkpoints, tmp_path):
    with pytest.raises(uda.UDAError, match="DECISION needs two checkpoints"):
        DECISION(checkpoints[:1])
    with pytest.raises(uda.UDAError, match="2 checkpoints but 1 inputs"):
        CAiDA(checkpoints, inputs=[{}])
    with pytest.raises(uda.UDAError, match="MSFDA: no checkpoint 'nowhere'"):
        target_model(MSFDA([checkpoints[0], "nowhere"]))
    (tmp_path / "text.ckpt").write_text("no model")
    with pytest.raises(uda.UDAError, match=r"text.ckpt' cannot be read as a checkpoint"):
        target_model(DECISION([checkpoints[0], str(tmp_path / "text.ckpt")]))
    with pytest.raises(uda.UDAError, match=r"s1.ckpt' was trained on 3 classes \['a', 'b', 'c'\]"):
        uda.UDA("identity", {"refine": DECISION(checkpoints)}, bottleneck=0, num_classes=3,
                class_names=["a", "c", "b"], input_shape=[6], target_name="target")  # fmt: skip
    with pytest.raises(uda.UDAError, match=r"trained on inputs of shape \[6\] and refuses those of this run, \[7\]"):
        uda.UDA("identity", {"refine": DECISION(checkpoints)}, bottleneck=0, num_classes=3, input_shape=[7])
    sizes = []
    for size in (8, 12):
        net = uda.UDA("small_cnn", {}, bottleneck=4, num_classes=3, input_shape=[1, size, size])
        state = {"hyper_parameters": {**net.hparams, "class_names": ["a", "b", "c"]}, "state_dict": net.state_dict()}
        torch.save(state, tmp_path / f"{size}.ckpt")
        sizes.append(str(tmp_path / f"{size}.ckpt"))
    given = {"bottleneck": 0, "num_classes": 3, "input_shape": [1, 8, 8]}
    with pytest.raises(uda.UDAError, match=r"12.ckpt' was trained on inputs of shape \[1, 12, 12\].*under inputs"):
        uda.UDA("identity", {"refine": DECISION(sizes)}, **given)
    assert uda.UDA("identity", {"refine": DECISION(sizes, inputs=[{}, {"size": 12}])}, **given).feature_dim == 8
    bare = source_model(tmp_path / "bare.ckpt", 2, 1)
    with pytest.raises(uda.UDAError, match=r"bare.ckpt' holds no class statistics.*uda export-source"):
        target_model(SMUDA([checkpoints[0], bare]))
    for name, change in (("means", lambda t: t[:2]), ("covariances", lambda t: t * torch.nan)):
        file = torch.load(checkpoints[1], weights_only=True)
        file["class_statistics"][name] = change(file["class_statistics"][name])
        torch.save(file, tmp_path / "odd.pt")
        with pytest.raises(uda.UDAError, match=rf"odd.pt' do not fit: {name} must be \[3, 8"):
            target_model(SMUDA([checkpoints[0], str(tmp_path / "odd.pt")]))
    with pytest.raises(uda.UDAError, match="inputs take size, channels, mean and std"):
        CAiDA(checkpoints, inputs=[{"sise": 8}, {}])
    wider = source_model(tmp_path / "wide.ckpt", 2, 1, bottleneck=12)
    with pytest.raises(uda.UDAError, match=r"widths are \[8, 12\]"):
        target_model(DECISION([checkpoints[0], wider]))
    assert target_model(MSFDA([checkpoints[0], wider])).feature_dim == 20


@pytest.mark.slow
@pytest.mark.parametrize("cls", METHODS)
def test_plugin(cls, checkpoints):
    check_plugin(
        cls, init_args={"checkpoints": checkpoints}, ddp=False, data_args={"source_val_fraction": 0.0},
        skip={"liveness": "without it the network is another"},
    )  # fmt: skip


@pytest.mark.slow
def test_under_two_processes(checkpoints):
    check_plugins_ddp([(cls, {"init_args": {"checkpoints": checkpoints}}) for cls in METHODS])
