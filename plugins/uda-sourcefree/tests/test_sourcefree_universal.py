"""GLC, GLC++ and LEAD: their equations in loops, what they tell apart, and rejection."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from uda_sourcefree import GLC, LEAD, GLCPlusPlus
from uda_sourcefree.glc import cluster_means, one_against_all
from uda_sourcefree.glc_plus import contrastive_affinity
from uda_sourcefree.lead import decide, known_basis, parts, two_means
from uda_sourcefree.universal import class_count

import uda
from uda.testing import TinyTask, check_plugin, forks


def blobs(n=40, classes=3, extra=1, width=8, noise=0.15, seed=0):
    """Features of length 1 around orthogonal directions, the last ``extra`` of them unknown; probabilities; truth."""
    draw = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes + extra), n)
    f = np.eye(width)[y] + noise * draw.normal(size=(len(y), width))
    f /= np.linalg.norm(f, axis=1, keepdims=True)
    z = 4 * f[:, :classes]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return torch.tensor(f), torch.tensor(p), y


def test_one_against_all_by_loops():
    f, p, y = blobs(n=12)
    x, q, clusters, rho = f.numpy(), p.numpy(), 4, 0.75
    number = len(x) // clusters
    prototypes, prior, negatives = [], [], []
    for c in range(3):
        order = sorted(range(len(x)), key=lambda i: -q[i, c])
        mean = sum(x[i] for i in order[:number]) / number
        prototypes.append(mean / np.linalg.norm(mean))
        prior.append((1 - rho) * np.mean([q[i, c] for i in order[:number]]) + rho)
        centres = cluster_means(torch.tensor(x[order[number:]]), clusters).numpy()
        negatives.append([v / np.linalg.norm(v) for v in centres])
    labels, unknown = one_against_all(f, p, clusters, rho)
    for i, v in enumerate(x):
        c = int(np.argmax([v @ u for u in prototypes]))
        assert int(labels[i]) == c
        assert bool(unknown[i]) == any(v @ prototypes[c] * prior[c] <= v @ u for u in negatives[c])
    assert (labels.numpy() == y)[y < 3].mean() > 0.9
    assert unknown.numpy()[y == 3].mean() > 0.9
    assert unknown.numpy()[y < 3].mean() < 0.3


def test_number_of_clusters():
    f, _, _ = blobs(n=20, classes=4, extra=4, width=10)
    for tsne in (False, True):
        assert class_count(f, 4, (0.5, 1.0, 2.0, 3.0), tsne) == 8
    assert class_count(f, 1, (0.25,)) == 2  # no candidate of two clusters or more


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return torch.nn.functional.normalize(x, dim=-1)


@pytest.mark.parametrize("clusters", [2, 3, 20])  # with 2 the batch of 7 ends after two hard negatives
def test_contrastive_affinity_by_loops(clusters):
    f, near, k = unit(7, 5).requires_grad_(), unit(7, 3, 5, seed=1), 3
    loss = contrastive_affinity(f, near, f, torch.eye(7, dtype=torch.bool), clusters)
    x, m, total, slope = f.detach().numpy(), near.numpy(), 0.0, np.zeros((7, 5))
    for i in range(7):
        ranked = sorted((j for j in range(7) if j != i), key=lambda j: -sum(x[i] * x[j]))
        hard = ranked[int(np.ceil(7 / clusters)) :][:k]
        assert len(hard) == (2 if clusters == 2 else k)
        slope[i] = (sum(x[j] for j in hard) - m[i].sum(0)) / 7  # of the anchor: the others are constants
        total += x[i] @ slope[i]
    assert float(loss.detach()) == pytest.approx(total, rel=1e-9)
    loss.backward()
    np.testing.assert_allclose(f.grad, slope, rtol=1e-9, atol=1e-12)


def one_step(cls, **given):
    """Objectives and gradient of the features in a first step, with a memory of twelve samples; and what went in."""
    torch.manual_seed(0)  # of the classifier
    x, plugin = unit(12, 6, seed=3).float(), cls(neighbours=2, **given)
    model = uda.UDA("identity", {"refine": plugin}, bottleneck=0, num_classes=3, input_shape=[6])
    plugin.memory = uda.nn.Bank(12, features=6, probs=3)
    plugin.memory.write(torch.arange(12), features=x, probs=torch.full((12, 3), 1 / 3))
    plugin.clusters.fill_(3)
    index = torch.tensor([4, 0, 9, 7, 2])
    now = (x[index] + 0.3 * unit(5, 6, seed=4).float()).requires_grad_()  # the batch has moved since
    target = model.batch(now)
    target.index, target.pseudo = index, uda.PseudoLabels(torch.zeros(5, dtype=torch.long))
    step = type("Step", (), {"target": target, "model": model})()
    out = plugin.refine_classifier(step)
    grad = torch.autograd.grad(sum(out.values()), now)[0]
    return out, grad, x, index, torch.nn.functional.normalize(now.detach(), dim=1)


def test_affinity_of_a_step_by_loops_and_that_it_reaches_the_features():
    out, grad, x, index, f = one_step(GLCPlusPlus)
    total = 0.0
    for i, me in enumerate(index.tolist()):
        near = sorted((j for j in range(12) if j != me), key=lambda j: -float(f[i] @ x[j]))[:2]  # of the memory
        new = dict(zip(index.tolist(), f, strict=True))
        hard = sorted((float(f[i] @ f[j]) for j in range(5) if j != i), reverse=True)[2:4]
        total += sum(hard) - sum(float(f[i] @ new.get(j, x[j])) for j in near)
    assert float(out["affinity"].detach()) == pytest.approx(total / 5, rel=1e-5)
    plain, without = one_step(GLC), one_step(GLCPlusPlus, affinity_weight=0.0)
    assert list(without[0]) == list(plain[0])
    torch.testing.assert_close(without[1], plain[1], rtol=0, atol=0)  # weight 0 is GLC
    assert float((grad - plain[1]).abs().min()) > 0


def test_known_and_unknown_part():
    torch.manual_seed(0)
    w, f = torch.randn(3, 7, dtype=torch.double), torch.randn(5, 7, dtype=torch.double)
    basis = known_basis(w)
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.double))
    known, unknown = parts(f, basis)
    for i in range(5):
        a = np.linalg.lstsq(w.T.numpy(), f[i].numpy(), rcond=None)[0]  # projection by least squares
        along = w.T.numpy() @ a
        assert float(known[i]) == pytest.approx(np.linalg.norm(along), rel=1e-6)
        assert float(unknown[i]) == pytest.approx(np.linalg.norm(f[i].numpy() - along), rel=1e-6)


def test_two_means():
    draw = np.random.default_rng(0)
    u = torch.tensor(np.concatenate([draw.normal(0.2, 0.05, 300), draw.normal(0.7, 0.1, 200)]))
    assert two_means(u) == pytest.approx((0.2, 0.7), abs=0.03)
    assert two_means(torch.full((10,), 0.4)) == pytest.approx((0.4, 0.4), abs=1e-6)  # degenerate


def test_decide_by_loops():
    f, p, y = blobs(n=10, seed=2)
    w = torch.eye(8, dtype=torch.double)[:3] + 0.1
    basis = known_basis(w)
    label, unknown, weight = decide(f, p, w, 4, basis)
    x, q, number = f.numpy(), p.numpy(), len(f) // 4
    u = parts(f, basis)[1].numpy()
    top = [sorted(range(len(x)), key=lambda i: -q[i, c])[:number] for c in range(3)]
    high = two_means(torch.tensor(u))[1]
    for i, v in enumerate(x):
        common = []
        for c in range(3):
            proto = np.mean([x[j] for j in top[c]], 0)
            near = max(v @ proto / np.linalg.norm(proto), 0)
            anchor = max(v @ w[c].numpy() / np.linalg.norm(w[c]), 0)
            common.append(np.sqrt((1 - np.exp(-near)) * np.exp(anchor - 1)))
        c = int(np.argmax(common))
        base = np.mean([u[j] for j in top[c]])
        threshold = base + common[c] * max(high - base, 0)
        assert int(label[i]) == c
        assert bool(unknown[i]) == (u[i] >= threshold)
        expected = 1 - (1 + (u[i] - threshold) ** 2 / 1e-4) ** (-(1 + 1e-4) / 2)
        assert float(weight[i]) == pytest.approx(expected, rel=1e-6)
    assert unknown.numpy()[y == 3].mean() > 0.9
    assert unknown.numpy()[y < 3].mean() < 0.3


def test_rejection_by_entropy():
    model = uda.UDA("identity", {"refine": GLC()}, bottleneck=0, num_classes=3, input_shape=[6])
    batch = model.batch(torch.zeros(3, 6))
    batch.views["x"].set_logits(torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 1.0, 0]]))
    batch.views["x"]._features = torch.zeros(3, 6)
    given = uda.Prediction(torch.tensor([0, 0, 1]), torch.ones(3))
    found = GLC(threshold=0.95).reject(model, batch, given)
    assert found.unknown.tolist() == [False, True, False]
    batch.role = "source"
    assert GLC().reject(model, batch, given) is None


def test_bad_arguments():
    for make in (
        lambda: GLC(label_weight=-1.0), lambda: GLC(prior=2.0), lambda: GLC(threshold=1.5), lambda: GLC(shares=()),
        lambda: LEAD(alpha=0.0), lambda: LEAD(target_classes=1), lambda: LEAD(recount=0),
        lambda: GLCPlusPlus(affinity_weight=-1.0),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()
    with pytest.raises(uda.UDAError, match="wider bottleneck"):
        uda.UDA("identity", {"refine": LEAD()}, bottleneck=0, num_classes=6, input_shape=[6])


@pytest.mark.slow
@pytest.mark.parametrize("cls", [GLC, GLCPlusPlus, LEAD])
def test_plugin(cls):
    check_plugin(cls, init_args={"neighbours": 3, "tsne": False}, ddp=False)


# ------------------------------------------------------------------------------------------------ several processes

TOGETHER = {
    "GLC": {"neighbours": 3, "target_classes": 3, "label_weight": 1.0}, "SHOT": {}, "AaD": {"neighbours": 3},
    "GLCPlusPlus": {"neighbours": 3, "target_classes": 4},
    "NRC": {"neighbours": 3, "expanded": 2}, "NOTELA": {"neighbours": 3, "trainable": "all", "dropout": 0.0},
    "CoLearn": {"threshold": 0.6},
}  # fmt: skip


def train_all(processes, out):
    """Each method on this rank; its final weights go to a file."""
    found = {}
    for name, given in TOGETHER.items():
        torch.manual_seed(0)
        data = uda.DataModule(TinyTask(), target="target", batch_size=16 // processes, epoch_steps=3, seed=1)
        model = uda.UDA(
            uda.nn.MLP([8], batch_norm=False), {"refine": {"class_path": name, "init_args": given}}, bottleneck=8,
            bottleneck_norm="layer", scores=[], optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
            schedule=uda.optim.Constant(),
        )  # fmt: skip
        trainer = L.Trainer(
            max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0, accelerator="cpu", devices=processes,
            strategy="ddp" if processes > 1 else "auto", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(model, data)
        found |= {f"{name}/{k}": v.clone() for k, v in model.state_dict().items()}
    torch.save(found, f"{out}{trainer.global_rank}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_batch_of_both(tmp_path):
    """Memories by sample index are equal bit for bit on both; weights are those of one process of twice the batch."""
    for processes in (1, 2):
        out = str(tmp_path / f"of{processes}-")
        wrong, outputs = forks.run_ranks(train_all, processes, out, folder=tmp_path, world=processes)
        assert not wrong, outputs
    one, first, second = (torch.load(tmp_path / f, weights_only=True) for f in ("of1-0.pt", "of2-0.pt", "of2-1.pt"))
    for k, v in one.items():
        torch.testing.assert_close(first[k], second[k], rtol=0, atol=0, msg=k)
        torch.testing.assert_close(first[k], v, rtol=1e-4, atol=1e-5, msg=k)
