"""ATDOC against its equations, written a second time in plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from uda_selftraining import ATDOC
from uda_selftraining import atdoc as module

import uda
from uda.testing import check_plugin

CLASSES, WIDTH, SIZE = 3, 4, 12


def fake_model():
    return SimpleNamespace(
        feature_dim=WIDTH, num_classes=CLASSES, base_seed=5, target_name="t", sizes={"t": SIZE}
    )


def built(**options):
    plugin = ATDOC(**options)
    plugin.build(fake_model())
    return plugin


def fake_step(features, logits, index, progress=1.0):
    target = SimpleNamespace(features=features, logits=logits, index=torch.as_tensor(index), cache={}, pseudo=None)
    return SimpleNamespace(target=target, progress=progress)


def draw(rows, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, WIDTH, generator=random), 2 * torch.randn(rows, CLASSES, generator=random)


def run(plugin, step):
    step.target.pseudo = plugin.pseudo_label(step)
    loss = plugin.refine_classifier(step)["auxiliary"]
    with torch.no_grad():
        plugin.after_step(step)
    return loss


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def unit(v):
    n = math.sqrt(sum(x * x for x in v))
    return [x / n for x in v]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


BATCHES = [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [0, 3, 6, 9, 2, 5], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("k", "rate", "temperature"), [(2, 1.0, 0.5), (5, 0.4, 1.0)])
def test_neighbourhood_aggregation_against_loops(weighted, k, rate, temperature):
    plugin = built(mode="na", neighbours=k, rate=rate, temperature=temperature, weighted=weighted, weight=0.6)
    features_of: dict[int, list[float]] = {}
    votes_of: dict[int, list[float]] = {}
    for seed, index in enumerate(BATCHES):
        features, logits = draw(6, seed)
        loss = run(plugin, fake_step(features, logits, index))
        probs = [softmax(row) for row in logits.double().tolist()]
        units = [unit(f) for f in features.double().tolist()]
        total = weights = 0.0
        for i, f, p in zip(index, units, probs, strict=True):
            others = sorted((j for j in features_of if j != i), key=lambda j: -dot(f, features_of[j]))[:k]
            vote = [sum(votes_of[j][c] for j in others) / k for c in range(CLASSES)]
            y = vote.index(max(vote))
            w = vote[y] if weighted else float(bool(others))
            total, weights = total - w * math.log(p[y]), weights + w
        expected = 0.6 * total / weights if weights else 0.0
        assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-7)
        power = [[v ** (1 / temperature) for v in p] for p in probs]
        mass = [sum(row[c] for row in power) for c in range(CLASSES)]
        for i, f, row in zip(index, units, power, strict=True):
            new = [v / m for v, m in zip(row, mass, strict=True)]
            if i in votes_of:
                new = [(1 - rate) * a + rate * b for a, b in zip(votes_of[i], new, strict=True)]
                f = [(1 - rate) * a + rate * b for a, b in zip(features_of[i], f, strict=True)]
            votes_of[i], features_of[i] = new, f
        for i in votes_of:
            torch.testing.assert_close(plugin.memory.votes[i].tolist(), votes_of[i], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(plugin.memory.features[i].tolist(), features_of[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("absent", ["skip", "shrink"])
def test_nearest_centroid_against_loops(absent):
    plugin = built(mode="nc", absent=absent)
    centroids = plugin.centroids.double().tolist()
    for seed, index in enumerate(BATCHES):
        features, logits = draw(6, seed)
        if seed == 2:
            logits[:, 1] = -9.0  # no sample is predicted as class 1
        loss = run(plugin, fake_step(features, logits, index))
        total = 0.0
        for f, z in zip(features.double().tolist(), logits.double().tolist(), strict=True):
            near = [dot(f, unit(c)) for c in centroids]
            total -= math.log(softmax(z)[near.index(max(near))])
        assert loss.item() == pytest.approx(total / 6, rel=1e-4)
        predicted = logits.argmax(1).tolist()
        for c in range(CLASSES):
            members = [f for f, y in zip(features.double().tolist(), predicted, strict=True) if y == c]
            if members or absent == "shrink":
                mean = [sum(f[k] for f in members) / max(len(members), 1) for k in range(WIDTH)]
                centroids[c] = [0.9 * a + 0.1 * b for a, b in zip(centroids[c], mean, strict=True)]
        torch.testing.assert_close(plugin.centroids.tolist(), centroids, rtol=1e-4, atol=1e-6)


def test_first_batch_of_na_is_without_labels():
    """There is no neighbour yet: no loss, no gradient, and a finite value."""
    plugin = built(mode="na")
    features, logits = draw(6, 0)
    logits.requires_grad_()
    loss = run(plugin, fake_step(features, logits, BATCHES[0]))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, [logits])[0].abs().max() == 0


@pytest.mark.parametrize("mode", ["na", "nc"])
def test_labels_are_constants_and_features_get_no_gradient_of_them(mode):
    plugin = built(mode=mode)
    run(plugin, fake_step(*draw(6, 0), BATCHES[0]))
    features, logits = draw(6, 1)
    features.requires_grad_(), logits.requires_grad_()
    step = fake_step(features, logits, BATCHES[1])
    label, confidence = plugin.labels(features, step.target.index)
    weight = confidence / confidence.sum()
    expected = weight[:, None] * (logits.softmax(1) - torch.nn.functional.one_hot(label, CLASSES))
    loss = plugin.refine_classifier(step)["auxiliary"]  # without pseudo_label: another plugin may have labelled
    got = torch.autograd.grad(loss, [logits, features], allow_unused=True)
    torch.testing.assert_close(got[0], expected.detach())
    assert got[1] is None


@pytest.mark.parametrize("mode", ["na", "nc"])
def test_memories_of_two_processes_equal_those_of_one(mode, two_processes):
    """Two halves of a batch, their exchanges played by two threads, against the whole batch."""
    whole, halves = built(mode=mode), [built(mode=mode) for _ in range(2)]
    steps = [(*draw(6, seed), torch.tensor(index)) for seed, index in enumerate(BATCHES)]
    for step in steps:
        run(whole, fake_step(*step))

    def work(number):
        part = slice(3 * number, 3 * number + 3)
        for step in steps:
            run(halves[number], fake_step(*(t[part] for t in step)))

    two_processes(module, work)
    for half in halves:
        torch.testing.assert_close(dict(half.named_buffers()), dict(whole.named_buffers()))


@pytest.mark.parametrize("mode", ["na", "nc"])
def test_descent_learns_the_clusters(mode):
    """A classifier that is right on most of each cluster comes to be right on all of it."""
    torch.manual_seed(0)
    y = torch.arange(SIZE) % CLASSES
    features = torch.eye(CLASSES, WIDTH)[y] + 0.1 * torch.randn(SIZE, WIDTH)
    logits = torch.eye(CLASSES)[y] + 0.1 * torch.randn(SIZE, CLASSES)
    logits[:3] = logits[[1, 2, 0]]  # one sample of each cluster is wrong
    plugin, index = built(mode=mode, neighbours=2, ramp="none"), torch.arange(SIZE)
    assert (logits.argmax(1) == y).float().mean() == pytest.approx(0.75)
    for _ in range(30):  # the ramp gives the memory as much time to leave its random start
        plugin.after_step(fake_step(features, logits, index))
    for _ in range(60):
        logits.requires_grad_()
        (grad,) = torch.autograd.grad(run(plugin, fake_step(features, logits, index)), [logits])
        logits = (logits - 5 * grad).detach()
    assert (logits.argmax(1) == y).all()


def test_pseudo_labels_for_others():
    plugin = built(mode="na")
    run(plugin, fake_step(*draw(6, 0), BATCHES[0]))
    features, logits = draw(6, 1)
    found = plugin.pseudo_label(fake_step(features, logits, BATCHES[1]))
    label, confidence = plugin.labels(features, torch.tensor(BATCHES[1]))
    assert torch.equal(found.y, label)
    assert torch.equal(found.weight, confidence)
    assert built(mode="nc").pseudo_label(fake_step(features, logits, BATCHES[1])).weight is None


def test_bad_arguments_are_refused():
    for options, text in (
        ({"mode": "nn"}, "unknown mode 'nn'.*'na'"),
        ({"neighbours": 0}, "must be positive"),
        ({"rate": 0.0}, "rate is a share"),
        ({"ramp": "linaer"}, "'linear'"),
    ):
        with pytest.raises(uda.UDAError, match=text):
            ATDOC(**options)
    with pytest.raises(uda.UDAError, match="target's size"):
        ATDOC().build(SimpleNamespace(**{**vars(fake_model()), "sizes": {}}))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["na", "nc"])
def test_plugin(mode):
    report = check_plugin(ATDOC, init_args={"mode": mode}, ddp=False)
    assert report.objectives == ["auxiliary"]
