"""Source-free methods against their equations in loops."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from uda_sourcefree import CoLearn
from uda_sourcefree.aad import dispersion
from uda_sourcefree.colearn import centroid_probs, match_or_conf
from uda_sourcefree.neighbours import largest, nearest
from uda_sourcefree.notela import mutual, teacher_labels
from uda_sourcefree.nrc import neighbour_agreement, reciprocity
from uda_sourcefree.shot import centroid_labels
from uda_sourcefree.shot_plus import sharpened, sure_share

import uda
from uda.checkpointing import without_downloads
from uda.images import rotate
from uda.testing import TinyTask


@pytest.mark.parametrize("threshold", [0, 3])
def test_centroid_labels_by_loops(threshold):
    draw = np.random.default_rng(0)
    f, p = draw.normal(size=(20, 4)), draw.dirichlet(np.ones(5) * 0.3, 20)
    p[:, 4] = 1e-6  # a class that no sample is predicted as
    g = [np.append(v, 1.0) / np.linalg.norm(np.append(v, 1.0)) for v in f]
    counts = np.bincount(p.argmax(1), minlength=5)
    weight, labels = p.copy(), None
    for _ in range(2):
        labels = []
        for v in g:
            cosine = []
            for c in range(5):
                centre = sum(w[c] * u for w, u in zip(weight, g, strict=True)) / (1e-8 + weight[:, c].sum())
                cosine.append(v @ centre / max(np.linalg.norm(centre), 1e-12) if counts[c] > threshold else -9)
            labels.append(int(np.argmax(cosine)))
        weight = np.eye(5)[labels]
    assert centroid_labels(torch.tensor(f), torch.tensor(p), 2, threshold).tolist() == labels
    assert 4 not in labels


def test_nearest_in_chunks_by_sorting():
    torch.manual_seed(0)
    x, own = torch.randn(30, 5), torch.arange(30)
    for chunk in (31, 2**20):
        found = nearest(x[:7], x, 3, own[:7], chunk)
        for i in range(7):
            order = sorted((j for j in range(30) if j != i), key=lambda j: -float(x[i] @ x[j]))
            assert found[i].tolist() == order[:3]


@pytest.mark.parametrize("n", [64 * 9 + 5, 64 * 9, 70])
def test_largest_by_sorting(n):
    """Blocks lose nothing, ties and columns behind the last whole block included."""
    x = torch.randint(0, 300, (6, n), generator=torch.Generator().manual_seed(n)).float()
    x[0, -3:] = 1000
    x[1] = 7
    found = largest(x, 4)
    assert torch.equal(x.gather(1, found), x.sort(dim=1, descending=True).values[:, :4])
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_nrc_by_loops():
    draw = np.random.default_rng(1)
    p, s = draw.dirichlet(np.ones(3), 4), draw.dirichlet(np.ones(3), 8)
    near = np.array([[4, 1], [0, 5], [3, 6], [2, 7]])
    wider = draw.integers(0, 8, (4, 2, 3))
    affinity = [[1.0 if i in wider[i, k] else 0.1 for k in range(2)] for i in range(4)]
    got = reciprocity(torch.tensor(near), torch.tensor(wider), torch.arange(4))
    np.testing.assert_allclose(got, affinity, rtol=1e-6)
    value = -sum(affinity[i][k] * p[i] @ s[near[i, k]] for i in range(4) for k in range(2)) / 4
    ours = neighbour_agreement(torch.tensor(p), torch.tensor(s)[torch.tensor(near)], got.double())
    assert float(ours) == pytest.approx(value, rel=1e-6)
    value = sum(p[i] @ p[m] for i in range(4) for m in range(4) if m != i) / 4
    assert float(dispersion(torch.tensor(p))) == pytest.approx(value, rel=1e-9)


def test_neighbours_are_constants_and_the_sample_is_not():
    p, s = torch.rand(3, 4, requires_grad=True), torch.rand(3, 2, 4)
    neighbour_agreement(p, s, 1.0).backward()
    torch.testing.assert_close(p.grad, -s.sum(1) / 3)


def test_notela_labels_maximise_its_objective():
    """The closed form against a search of ``y . log p + lambda y . mean_j p_j + a H(y)`` on a grid of the simplex."""
    draw = np.random.default_rng(2)
    z, near = draw.normal(size=(3, 3)), draw.dirichlet(np.ones(3), (3, 4))
    weight = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]], float)
    strength, a = 1.7, 0.8
    found = teacher_labels(*map(torch.tensor, (z, near, weight)), strength, a)
    side = np.linspace(1e-4, 1, 400)
    grid = np.array([(u, v, 1 - u - v) for u in side for v in side if u + v < 1])
    for i in range(3):
        p = np.exp(z[i]) / np.exp(z[i]).sum()
        pull = sum(w * q for w, q in zip(weight[i], near[i], strict=True)) / max(weight[i].sum(), 1)
        value = grid @ np.log(p) + strength * grid @ pull - a * (grid * np.log(grid)).sum(1)
        np.testing.assert_allclose(found[i], grid[value.argmax()], atol=4e-3)


def test_colearn_by_loops():
    draw = np.random.default_rng(3)
    g, w = draw.normal(size=(12, 5)), draw.random((12, 4))
    w[:, 3] = 0  # a class without weight
    found = centroid_probs(torch.tensor(g), torch.tensor(w), 0.3)
    for i in range(12):
        value = []
        for c in range(3):
            centre = sum(w[j, c] * g[j] for j in range(12)) / w[:, c].sum()
            value.append(np.exp(g[i] @ centre / np.linalg.norm(g[i]) / np.linalg.norm(centre) / 0.3))
        np.testing.assert_allclose(found[i], [v / sum(value) for v in value] + [0.0], rtol=1e-6)


def test_match_or_conf_in_all_cases():
    def row(label, sure):
        high, low = (0.9, 0.05) if sure else (0.4, 0.3)
        return [high if c == label else low for c in range(3)]

    cases = [  # label and sureness of both branches; the label, and whether it counts
        ((0, True), (0, True), 0, True), ((1, False), (1, False), 1, True), ((0, True), (1, False), 0, True),
        ((0, False), (1, True), 1, True), ((0, True), (1, True), 0, False), ((0, False), (1, False), 0, False),
    ]  # fmt: skip
    first, second = (torch.tensor([row(*c[i]) for c in cases]) for i in (0, 1))
    labels, kept = match_or_conf(first, second, 0.5)
    assert labels.tolist() == [c[2] for c in cases]
    assert kept.tolist() == [c[3] for c in cases]


class Second(torch.nn.Module):
    """Takes note of what it sees; its features are the pixels."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x.flatten(1)


def test_colearn_shows_the_second_network_its_own_view():
    """Its size and normalisation, once for the whole target and in order; the model goes on with the run's."""
    second, train = Second(), []
    views = uda.data.Views(test=lambda image: 4 * image[:, ::2, ::2] - 1)
    model = uda.UDA("small_cnn", {"pseudo": CoLearn(second, views, threshold=0.0)}, bottleneck=8, scores=[])
    model.backbone.register_forward_pre_hook(lambda _, x: train.append(x[0].shape[1:]))
    data = uda.DataModule(TinyTask(kind="images"), target="target", batch_size=8, epoch_steps=2, eval_batch_size=20)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    L.Trainer(max_epochs=2, accelerator="cpu", devices=1, **quiet).fit(model, data)
    seen = torch.cat(second.seen)
    raw = TinyTask(kind="images").read("target").inputs.x
    torch.testing.assert_close(seen, 4 * raw[:, :, ::2, ::2] - 1)
    assert set(train) == {torch.Size([1, 8, 8])}
    probs = centroid_probs(model.plugins["pseudo"]._second, torch.eye(48))
    assert probs.argmax(1).tolist() == list(range(48))  # rows of the bank are those of the samples


def test_colearn_needs_its_pretrained_network():
    """A name that starts at random is refused; a checkpoint fetches no weights, and tells another network."""
    with pytest.raises(uda.UDAError, match="'timm:resnet18' starts at random"):
        CoLearn("timm:resnet18")
    spec = {"class_path": "uda.nn.Timm", "init_args": {"name": "resnet18", "pretrained": True}}
    pseudo = {"class_path": "CoLearn", "init_args": {"network": spec, "weight": 0.5}}
    kept = without_downloads({"plugins": {"pseudo": pseudo, "b": "SHOT"}})["plugins"]
    assert kept["pseudo"]["init_args"]["network"]["init_args"] == {"name": "resnet18", "pretrained": False}
    assert kept["pseudo"]["init_args"]["weight"] == 0.5
    assert kept["b"] == "SHOT"
    plugin = CoLearn(Second())
    model = uda.UDA("identity", {"pseudo": plugin}, bottleneck=8, num_classes=3, input_shape=[6], sizes={"target": 9})
    plugin.check.fill_(7)
    with pytest.raises(uda.UDAError, match="another than that of the checkpoint"):
        plugin._features(model)


def test_shot_plus_splits_each_class_by_entropy():
    draw = np.random.default_rng(4)
    labels, entropy = draw.integers(0, 4, 31), draw.random(31)
    labels[labels == 2] = 3  # a class that nothing is predicted as
    found = sure_share(torch.tensor(labels), torch.tensor(entropy), 0.5)
    for c in (0, 1, 3):
        members = np.flatnonzero(labels == c)
        first = members[np.argsort(entropy[members])][: int(np.ceil(len(members) / 2))]
        assert found[members].nonzero().flatten().tolist() == [i for i, m in enumerate(members) if m in first]


def test_shot_plus_turns_and_sharpens():
    x = torch.randn(4, 2, 3, 3)
    found = rotate(x, torch.tensor([0, 3, 1, 2]))
    for i, k in enumerate((0, 3, 1, 2)):
        np.testing.assert_array_equal(found[i], np.rot90(x[i].numpy(), k, (1, 2)))
    torch.testing.assert_close(sharpened(torch.tensor([[0.6, 0.4]]), 0.5), torch.tensor([[0.36, 0.16]]) / 0.52)


def test_notela_takes_each_class_by_itself():
    """The multi-label labels are the single-label ones of "no" and "yes", class by class."""
    torch.manual_seed(0)
    z, near = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 2, 4, dtype=torch.float64)
    weight = torch.tensor([[1.0, 1], [0, 0], [0, 1]], dtype=torch.float64)
    found = teacher_labels(z, near, weight, 1.3, 0.7, multi_label=True)
    for c in range(4):
        two = torch.stack([torch.zeros(3), z[:, c]], 1).double()
        others = torch.stack([1 - near[:, :, c], near[:, :, c]], 2)
        torch.testing.assert_close(found[:, c], teacher_labels(two, others, weight, 1.3, 0.7)[:, 1])


def test_notela_neighbours_are_euclidean_and_mutual():
    x = torch.tensor([[0.0, 0], [1, 0], [1.5, 0], [30, 30], [32, 32]])
    near = nearest(x, x, 2, torch.arange(5), euclidean=True)
    for i in range(5):
        order = sorted((j for j in range(5) if j != i), key=lambda j: float((x[i] - x[j]).norm()))
        assert near[i].tolist() == order[:2]
    expected = [[float(i in near[j].tolist()) for j in near[i].tolist()] for i in range(5)]
    assert mutual(near, near[near], torch.arange(5)).tolist() == expected
    assert expected[3] == [1.0, 0.0]  # the far pair has each other, and nobody else has it
