"""GeT against its equations, written a second time in plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from uda_selftraining import GeT
from uda_selftraining import get as module

import uda
from uda.testing import check_plugin

CLASSES, WIDTH = 3, 4


def fake_model(size=20, seed=5):
    torch.manual_seed(1)
    head = torch.nn.Linear(WIDTH, CLASSES)
    head.weight_vectors = head.weight
    return SimpleNamespace(
        feature_dim=WIDTH, num_classes=CLASSES, base_seed=seed, head=head, target_name="t", sizes={"t": size}
    )


def fake_step(model, features, index=None, progress=0.5, batch_idx=1):
    index = torch.arange(len(features)) if index is None else index
    target = SimpleNamespace(features=features, logits=model.head(features), index=index, cache={})
    return SimpleNamespace(model=model, target=target, progress=progress, batch_idx=batch_idx)


def built(model, **options):
    plugin = GeT(**options)
    plugin.build(model)
    return plugin


def batch(rows=7, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------ the equations in plain loops


def softmax(z):
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def posteriors(features, prototypes, prior, temperature):
    return [
        softmax([math.log(p) + cosine(f, m) / temperature for p, m in zip(prior, prototypes, strict=True)])
        for f in features
    ]


def labels_of(probs, hard, share, mass=None):
    mass = mass or [sum(row[c] for row in probs) for c in range(CLASSES)]
    out = []
    for row, y in zip(probs, hard, strict=True):
        q = [p / math.sqrt(m) for p, m in zip(row, mass, strict=True)]
        out.append([(1 - share) * v / sum(q) + share * (c == y) for c, v in enumerate(q)])
    return out


def cross_entropy(labels, probs):
    rows = zip(labels, probs, strict=True)
    return -sum(y * math.log(p) for ys, ps in rows for y, p in zip(ys, ps, strict=True)) / len(labels)


class ByHand:
    """State and one step of the method in Python lists."""

    def __init__(self, plugin, model, temperature=1.0, share=0.2, prior_rate=0.01, rate=0.9):
        self.prior, self.mu = plugin.prior.tolist(), plugin.prototypes.double().tolist()
        self.weights = {"g": model.head.weight.double().tolist(), "f": plugin.embedding.double().tolist()}
        self.temperature, self.share, self.prior_rate, self.rate = temperature, share, prior_rate, rate

    def step(self, features):
        features = features.double().tolist()
        bank = posteriors(features, self.mu, self.prior, self.temperature)
        hard = [row.index(max(row)) for row in bank]
        losses, probs = {}, {}
        for head, weights in self.weights.items():
            probs[head] = posteriors(features, weights, self.prior, self.temperature)
            losses[head] = cross_entropy(labels_of(probs[head], hard, self.share), probs[head])
        mean = [sum(row[c] for row in probs["g"]) / len(features) for c in range(CLASSES)]
        self.prior = [(1 - self.prior_rate) * p + self.prior_rate * m for p, m in zip(self.prior, mean, strict=True)]
        for c in range(CLASSES):
            members = [f for f, row in zip(features, probs["g"], strict=True) if row.index(max(row)) == c]
            for k in range(WIDTH):
                if members:
                    new = sum(f[k] for f in members) / len(members)
                    self.mu[c][k] = (1 - self.rate) * self.mu[c][k] + self.rate * new
        return losses


def one_step(plugin, model, features, **options):
    step = fake_step(model, features, **options)
    losses = plugin.refine_classifier(step)
    with torch.no_grad():
        plugin.after_step(step)
    return losses


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1, "label_mix": 0.6, "prior_rate": 0.3, "prototype_rate": 0.1}]
)
def test_three_steps_against_loops(options):
    model = fake_model()
    plugin = built(model, weight=0.7, embedding_weight=0.5, **options)
    names = {"temperature": "temperature", "label_mix": "share", "prior_rate": "prior_rate", "prototype_rate": "rate"}
    by_hand = ByHand(plugin, model, **{names[k]: v for k, v in options.items()})
    for seed in range(3):
        got, expected = one_step(plugin, model, batch(seed=seed)), by_hand.step(batch(seed=seed))
        assert got["classifier"].item() == pytest.approx(0.7 * expected["g"], rel=1e-4)
        assert got["embedding"].item() == pytest.approx(0.7 * 0.5 * expected["f"], rel=1e-4)
        torch.testing.assert_close(plugin.prior.tolist(), by_hand.prior, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(plugin.prototypes.tolist(), by_hand.mu, rtol=1e-4, atol=1e-6)


def test_balanced_labels_favour_rare_classes():
    """A class of a quarter of the mass gains a factor of two against the other."""
    probs = torch.tensor([[0.8, 0.2], [0.8, 0.2]])
    torch.testing.assert_close(
        module.balanced_labels(probs, probs.sum(0)), torch.tensor([[2 / 3, 1 / 3]]).expand(2, 2)
    )


def test_labels_are_constants_and_gradients_reach_all_parts():
    """d/dz of the cross-entropy on fixed labels is (P - label) / B, in features, head and learnable prototypes."""
    model = fake_model()
    plugin = built(model, temperature=0.3)
    features = batch().requires_grad_()
    losses = plugin.refine_classifier(fake_step(model, features))
    for head, weights in (("classifier", model.head.weight), ("embedding", plugin.embedding)):
        z = (F.normalize(features, dim=1) @ F.normalize(weights, dim=1).T / 0.3).detach().requires_grad_()
        p = z.softmax(1)
        hard = (F.normalize(features, dim=1) @ plugin.prototypes.T).argmax(1)
        fixed = 0.8 * p / p.sum(0).sqrt() / (p / p.sum(0).sqrt()).sum(1, keepdim=True) + 0.2 * F.one_hot(hard, CLASSES)
        expected_z = ((p - fixed) / len(p)).detach()
        again = F.normalize(features, dim=1) @ F.normalize(weights, dim=1).T / 0.3
        expected = torch.autograd.grad((again * expected_z).sum(), [features, weights])
        got = torch.autograd.grad(losses[head], [features, weights], retain_graph=True)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
        assert float(got[1].abs().max()) > 1e-3


def test_prior_estimates():
    """The posterior's mean keeps the prior a distribution; so does the cosine as printed, after clamping."""
    prior = torch.tensor([0.5, 0.3, 0.2])
    moved = module.next_prior(prior, torch.tensor([0.2, 0.2, 0.6]), 0.1)
    torch.testing.assert_close(moved, 0.9 * prior + 0.1 * torch.tensor([0.2, 0.2, 0.6]))
    negative = module.next_prior(prior, torch.tensor([-0.5, 0.1, 0.3]), 1.0)
    torch.testing.assert_close(negative, torch.tensor([0.0, 0.25, 0.75]), atol=1e-5, rtol=0)
    assert float(negative.min()) > 0
    model = fake_model()
    plugin = built(model, prior_estimate="cosine", prior_rate=0.5, temperature=2.0)
    features = batch()
    rows = [[cosine(f, w) / 2 for w in model.head.weight.tolist()] for f in features.tolist()]
    mean = [max(sum(r[c] for r in rows) / len(rows), 1e-6) for c in range(CLASSES)]
    one_step(plugin, model, features)
    expected = [0.5 / 3 + 0.5 * m / sum(mean) for m in mean]
    torch.testing.assert_close(plugin.prior.tolist(), expected, rtol=1e-4, atol=1e-5)


def test_prior_shifts_the_posterior():
    model = fake_model()
    plugin = built(model)
    plugin.prior.copy_(torch.tensor([0.7, 0.2, 0.1]))
    features = batch()
    step = fake_step(model, features)
    plugin.refine_classifier(step)
    expected = posteriors(features.tolist(), model.head.weight.tolist(), [0.7, 0.2, 0.1], 1.0)
    torch.testing.assert_close(step.target.cache[".probs"]["g"].tolist(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("skip", [True, False])
def test_prototype_of_an_absent_class(skip):
    start, features = batch(CLASSES, seed=3), batch(5)
    moved = module.next_prototypes(start, features, torch.tensor([0, 0, 2, 2, 2]), 0.9, skip)
    torch.testing.assert_close(moved[1], start[1] if skip else 0.1 * start[1])
    torch.testing.assert_close(moved[2], 0.1 * start[2] + 0.9 * features[2:].mean(0))


def test_logits_as_posterior():
    """With a uniform prior that stays, P_g is the softmax of the ordinary logits."""
    model = fake_model()
    plugin = built(model, posterior="logits", prior_rate=0.0)
    step = fake_step(model, batch())
    one = plugin.refine_classifier(step)
    torch.testing.assert_close(step.target.cache[".probs"]["g"], step.target.logits.softmax(1))
    assert torch.autograd.grad(one["classifier"], model.head.bias)[0].abs().max() > 0


def test_prediction_by_the_generative_classifier():
    """With the prior, on the target only."""
    model = fake_model()
    plugin = built(model, predict_by="generative", temperature=0.5)
    plugin.prior.copy_(torch.tensor([0.7, 0.2, 0.1]))
    features = batch()
    target = SimpleNamespace(features=features, logits=model.head(features), role="target")
    found = plugin.predict(model, target)
    expected = posteriors(features.tolist(), model.head.weight.tolist(), [0.7, 0.2, 0.1], 0.5)
    assert found.label.tolist() == [row.index(max(row)) for row in expected]
    torch.testing.assert_close(found.score.tolist(), [max(row) for row in expected], rtol=1e-4, atol=1e-6)
    assert plugin.predict(model, SimpleNamespace(**{**vars(target), "role": "source"})) is None
    assert built(model).predict(model, target) is None


def test_balance_at_the_prior():
    """Labels whose shares equal the prior are left as they are; the uniform balance draws them to equal shares."""
    model, probs = fake_model(), torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.6, 0.3, 0.1]])
    shares = {}
    for balance in ("uniform", "prior"):
        plugin = built(model, balance=balance, label_mix=0.0)
        plugin.prior.copy_(probs.mean(0))
        labels = plugin.soft_labels(batch(3), {"g": probs}, torch.arange(3))["g"]
        shares[balance] = labels.mean(0)
    torch.testing.assert_close(shares["prior"], probs.mean(0))
    assert shares["uniform"].min() > 1.5 * probs.mean(0).min()


def test_mass_of_the_domain():
    """Equation 6 over the latest posterior of every sample that was seen, the current ones included."""
    model = fake_model(size=8)
    plugin = built(model, mass="domain", prior_rate=0.0)
    latest: dict[int, list[float]] = {}
    for seed, index in enumerate([[0, 1, 2], [3, 4, 5], [0, 4, 7]]):
        features = batch(3, seed)
        step = fake_step(model, features, torch.tensor(index))
        got = plugin.refine_classifier(step)["classifier"]
        probs = posteriors(features.tolist(), model.head.weight.tolist(), [1 / 3] * 3, 1.0)
        latest.update(zip(index, probs, strict=True))
        mass = [sum(row[c] for row in latest.values()) for c in range(CLASSES)]
        bank = posteriors(features.tolist(), plugin.prototypes.tolist(), [1 / 3] * 3, 1.0)
        labels = labels_of(probs, [row.index(max(row)) for row in bank], 0.2, mass)
        assert got.item() == pytest.approx(cross_entropy(labels, probs), rel=1e-4)
        plugin.after_step(step)
    with pytest.raises(uda.UDAError, match="size of the target"):
        built(SimpleNamespace(**{**vars(fake_model()), "sizes": {}}), mass="domain")


def test_learnable_prototypes_start_each_epoch_from_the_memory():
    model = fake_model()
    plugin = built(model)
    optimizer = torch.optim.SGD([plugin.embedding, model.head.weight], lr=0.1, momentum=0.9)
    model._trainer = SimpleNamespace(optimizers=[optimizer])
    for batch_idx in (0, 1):
        step = fake_step(model, batch(), batch_idx=batch_idx)
        plugin.prepare_batch(step)
        sum(plugin.refine_classifier(step).values()).backward()
        optimizer.step()
        plugin.after_step(step)
    assert not torch.equal(plugin.embedding, plugin.prototypes)
    plugin.prepare_batch(fake_step(model, batch(), batch_idx=1))
    assert not torch.equal(plugin.embedding, plugin.prototypes)
    plugin.prepare_batch(fake_step(model, batch(), batch_idx=0))
    assert torch.equal(plugin.embedding, plugin.prototypes)
    assert plugin.embedding not in optimizer.state
    assert model.head.weight in optimizer.state


@pytest.mark.parametrize("mass", ["batch", "domain"])
def test_memories_of_two_processes_equal_those_of_one(mass, two_processes):
    """Two halves of a batch, their exchanges played by two threads, against the whole batch."""
    model = fake_model()
    options = {"temperature": 0.2, "prior_rate": 0.2, "mass": mass}
    whole, halves = built(model, **options), [built(model, **options) for _ in range(2)]
    expected = [one_step(whole, model, batch(8, seed), index=8 + torch.arange(8)) for seed in range(2)]
    got: list[list] = [[], []]

    def run(number):
        for seed in range(2):
            part = slice(4 * number, 4 * number + 4)
            got[number].append(one_step(halves[number], model, batch(8, seed)[part], index=8 + torch.arange(8)[part]))

    two_processes(module, run)
    for half in halves:
        torch.testing.assert_close(half.prior, whole.prior)
        torch.testing.assert_close(half.prototypes, whole.prototypes)
    for name in ("classifier", "embedding"):
        for i in range(2):
            mean = (got[0][i][name] + got[1][i][name]) / 2
            torch.testing.assert_close(mean, expected[i][name])


def test_descent_sorts_the_clusters():
    """Turned clusters of unequal size: steps on the objectives raise the share that the classifier gets right."""
    torch.manual_seed(0)
    y = torch.tensor([0] * 40 + [1] * 15 + [2] * 15)
    turn = torch.linalg.matrix_exp(0.8 * torch.tensor([[0.0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    features = (torch.eye(3, 4)[y] @ turn + 0.2 * torch.randn(70, 4)).requires_grad_(False)
    model = fake_model()
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(3, 4))
        model.head.bias.zero_()
    plugin = built(model, temperature=0.1, prototype_rate=0.1)

    def accuracy():
        return float((model.head(features).argmax(1) == y).float().mean())

    before, optimizer = accuracy(), torch.optim.SGD([model.head.weight, plugin.embedding], lr=0.2)
    for i in range(150):
        step = fake_step(model, features, torch.arange(70) % 20, batch_idx=i % 25)
        plugin.prepare_batch(step)
        optimizer.zero_grad()
        sum(plugin.refine_classifier(step).values()).backward()
        optimizer.step()
        plugin.after_step(step)
    assert accuracy() > max(before, 0.95)
    assert plugin.prior[0] > plugin.prior[1:].max()


def test_ramps_scale_the_objective():
    model = fake_model()
    for progress in (0.0, 0.5, 1.0):
        step = fake_step(model, batch(), progress=progress)
        full = built(model).refine_classifier(step)["classifier"]
        linear = built(model, ramp="linear").refine_classifier(step)["classifier"]
        torch.testing.assert_close(linear, progress * full)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"label_mix": 1.5}, "label_mix is a share"),
        ({"prior_estimate": "posteriour"}, "'posterior'"),
        ({"mass": "dataset"}, "unknown mass"),
        ({"ramp": "linaer"}, "'linear'"),
    ],
)
def test_bad_arguments_are_refused(options, text):
    with pytest.raises(uda.UDAError, match=text):
        GeT(**options)


def test_a_deep_head_is_refused():
    model = SimpleNamespace(head=torch.nn.Sequential(torch.nn.Linear(4, 3)))
    plugin = GeT()
    plugin.register_buffer("prior", torch.full((3,), 1 / 3))
    with pytest.raises(uda.UDAError, match="a Sequential has none"):
        plugin.log_posteriors(model, torch.randn(2, 4), torch.randn(2, 3))


OPTIONS = {"mass": "domain", "posterior": "logits", "temperature": 0.1, "predict_by": "generative"}


@pytest.mark.parametrize("init_args", [pytest.param({}, marks=pytest.mark.slow), OPTIONS])
def test_plugin(init_args):
    report = check_plugin(GeT, init_args=init_args, ddp=False)
    assert report.objectives == ["classifier", "embedding"]
