"""Methods of several sources against their equations in loops."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn import functional as F
from uda_multisource import DARN, M3SDA, MDAN, MFSAN, LanDA, SourceWeights
from uda_multisource.darn import aggregation_weights
from uda_multisource.heads import SourceHeads, mean_of_probs
from uda_multisource.m3sda import moment_distance
from uda_multisource.mdan import hard_join, soft_join
from uda_multisource.mfsan import classifier_gap

import uda
from uda import objectives
from uda.testing import TinyTask, check_plugin, check_plugins_ddp

NET = {"hidden": 5, "layers": 1, "batch_norm": False, "gamma": 0.0}
TWO = {"sources": 2}
CASES = [
    (MDAN, {"init_args": {**NET, "gamma": 10.0}, **TWO}),
    (MDAN, {"init_args": {**NET, "mode": "hard"}, **TWO}),
    (DARN, {"init_args": NET, **TWO}),
    (M3SDA, {"init_args": {"pairs": True}, **TWO}),
    (MFSAN, {"init_args": {"hidden": 6}, **TWO}),
    (SourceWeights, {"init_args": {"by": "given", "shares": {"source": 3.0, "source2": 1.0}}, **TWO}),
]


# -------------------------------------------------------------------------------------------- joined losses


def test_darn_weights_minimise_over_the_simplex():
    """No point of a fine grid is below, and the value is the paper's ``nu``."""
    draw = np.random.default_rng(0)
    grid = [(i / 60, j / 60, 1 - (i + j) / 60) for i in range(61) for j in range(61 - i)]
    for scale in (0.1, 1.0, 10.0):
        g = draw.normal(size=3) * scale
        a = aggregation_weights(torch.tensor(g)).numpy()
        assert a.sum() == pytest.approx(1)
        value = a @ g + np.linalg.norm(a)
        assert value <= min(np.array(p) @ g + np.linalg.norm(p) for p in grid) + 1e-9
        assert np.linalg.norm(np.maximum(value - g, 0)) == pytest.approx(1)  # nu is the value at the minimum
    assert aggregation_weights(torch.tensor([0.0, 5.0, 5.0])).tolist() == [1, 0, 0]
    torch.testing.assert_close(aggregation_weights(torch.full((4,), 3.0)), torch.full((4,), 0.25))


def test_hard_and_soft_maximum():
    e, d = torch.tensor([0.5, 2.0, 1.0]), torch.tensor([0.7, 0.6, 0.2])
    assert float(hard_join(e, d)) == pytest.approx(2.2)
    expected = math.log(sum(math.exp(10 * x) for x in (e + d).tolist())) / 10
    assert float(soft_join(e + d, 10.0)) == pytest.approx(expected, rel=1e-6)
    assert float(soft_join(torch.tensor([1e4, 1.0]), 10.0)) == pytest.approx(1e4)


def discriminator(net, x):
    w1, b1, w2, b2 = (p.detach().double() for p in net.parameters())
    return ((x.double() @ w1.T + b1).relu() @ w2.T + b2).squeeze(1)


@pytest.mark.parametrize("cls", [MDAN, DARN])
def test_sum_is_the_papers_loss(make_step, cls):
    """classification + joined from plain formulas, and its gradient on the features, the discriminator's reversed."""
    plugin = cls(sharpness=2.0, weight=0.6, **NET)
    model, step = make_step({"align": plugin})
    for b in (*step.sources.values(), step.target):
        b.features = b.x.clone().requires_grad_()
    objectives.collect(model, step)
    total = sum(step.objectives.values())
    xs = [b.x.double().requires_grad_() for b in step.sources.values()]
    xt = step.target.x.double()
    w, b0 = (p.detach().double() for p in model.head.parameters())
    e = [F.cross_entropy(x @ w.T + b0, b.y) for x, b in zip(xs, step.sources.values(), strict=True)]
    d = []
    for net, x in zip(plugin.discriminators, xs, strict=True):
        p, q = discriminator(net, x).sigmoid(), discriminator(net, xt).sigmoid()
        d.append(-(p.log().mean() + (1 - q).log().mean()) / 2)
    losses = [float((a + 0.6 * b).detach()) for a, b in zip(e, d, strict=True)]
    if cls is MDAN:
        value = math.log(sum(math.exp(2 * v) for v in losses)) / 2
        share = [math.exp(2 * v) / sum(math.exp(2 * u) for u in losses) for v in losses]
    else:
        share = min(([i / 2000, 1 - i / 2000] for i in range(2001)),
                    key=lambda a: sum(x * 2 * v for x, v in zip(a, losses, strict=True)) + math.hypot(*a))  # fmt: skip
        value = sum(a * v for a, v in zip(share, losses, strict=True)) + math.hypot(*share) / 2
    assert float(total.detach()) == pytest.approx(value, rel=1e-4)
    got = torch.autograd.grad(total, [b.features for b in step.sources.values()])
    for i in range(2):  # the classification descends, the discriminator's loss is reversed
        plain = torch.autograd.grad(share[i] * (e[i] - 0.6 * d[i]), xs[i])[0]
        torch.testing.assert_close(got[i].double(), plain, rtol=2e-3, atol=1e-5)


def test_hard_mode_trains_one_source(make_step):
    plugin = MDAN(mode="hard", weight=0.6, **NET)
    model, step = make_step({"align": plugin})
    for b in (*step.sources.values(), step.target):
        b.features = b.x.clone().requires_grad_()
    objectives.collect(model, step)
    total = sum(step.objectives.values())
    e = [float(F.cross_entropy(b.logits, b.y).detach()) for b in step.sources.values()]
    d = plugin.per_source_domain(step).tolist()
    assert float(total.detach()) == pytest.approx(max(e) + 0.6 * min(d), rel=1e-5)


def test_weights_of_sources(make_step):
    expected = {"equal": (0.5, 0.5), "size": (1 / 3, 2 / 3), "given": (0.25, 0.75)}
    for by, shares in expected.items():
        plugin = SourceWeights(by, {"a": 1.0, "b": 3.0} if by == "given" else None)
        model, step = make_step({"weights": plugin})
        objectives.prepare(model, step)
        objectives.collect(model, step)
        losses = [float(F.cross_entropy(b.logits, b.y).detach()) for b in step.sources.values()]
        value = float(step.objectives["classification"].detach())
        assert value == pytest.approx(sum(s * v for s, v in zip(shares, losses, strict=True)), rel=1e-5)
    model, step = make_step({"weights": plugin})
    step.sources["a"].weight = torch.full((6,), 0.5)
    objectives.prepare(model, step)
    assert step.sources["a"].weight.tolist() == [0.25] * 6


# --------------------------------------------------------------------------------- heads, moments, branches


def test_moment_distance_by_loops():
    draw = np.random.default_rng(0)
    xs, t = [draw.normal(size=(n, 3)) for n in (4, 5, 6)], draw.normal(size=(7, 3))
    for second in ("raw", "variance"):
        value = 0.0
        for k in (1, 2):
            def moment(x, k=k, second=second):
                return x.var(0, ddof=1) if k == 2 and second == "variance" else (x**k).mean(0)

            value += np.mean([np.linalg.norm(moment(x) - moment(t)) for x in xs])
            value += np.mean([np.linalg.norm(moment(xs[i]) - moment(xs[j])) for i in range(3) for j in range(i)])
        got = moment_distance([torch.tensor(x) for x in xs], torch.tensor(t), second)
        assert float(got) == pytest.approx(value, rel=1e-6)


def test_each_source_has_its_classifier_and_the_target_their_mean(make_step):
    model, step = make_step({"align": M3SDA()})
    heads = model.head
    assert isinstance(heads, SourceHeads)
    for i, b in enumerate(step.sources.values()):
        torch.testing.assert_close(b.logits, heads.classifiers[i][0](b.x))
    probs = (heads.classifiers[0][0](step.target.x).softmax(1) + heads.classifiers[1][0](step.target.x).softmax(1)) / 2
    torch.testing.assert_close(step.target.logits.softmax(1), probs)
    torch.testing.assert_close(model(step.target.x).softmax(1), probs)  # no domain is active
    objectives.collect(model, step)
    losses = [F.cross_entropy(heads.classifiers[i][0](b.x), b.y) for i, b in enumerate(step.sources.values())]
    torch.testing.assert_close(step.objectives["classification"], sum(losses) / 2)
    assert mean_of_probs([torch.tensor([[500.0, -500.0]])]).isfinite().all()


def test_a_source_has_no_vote_on_classes_that_it_lacks(make_step):
    """A class has the mean of the classifiers that know it, each a softmax over its classes, by loops."""
    for plugin in (M3SDA(pairs=True), MFSAN(hidden=3, ramp="none")):
        model, step = make_step({"align": plugin}, missing_classes={"b": [2]})
        model.eval()
        logits = [z.detach().double().numpy() for i in range(2) for z in model.head.each(i, step.target.x)]
        owners, known = np.repeat([0, 1], len(logits) // 2), [[0, 1, 2], [0, 1]]
        expected = np.zeros((5, 3))
        for n, c in np.ndindex(5, 3):
            pairs = [(z[n], known[i]) for z, i in zip(logits, owners, strict=True) if c in known[i]]
            expected[n, c] = np.mean([np.exp(z[c]) / np.exp(z[k]).sum() for z, k in pairs])
        found = model(step.target.x).softmax(1).detach().numpy()
        np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-5)
    p, q = (torch.tensor(z).softmax(1) for z in logits)
    gap = classifier_gap([torch.tensor(z) for z in logits], model.head.known)
    assert float(gap) == pytest.approx(float((p - q).abs()[:, :2].sum() / 15), rel=1e-6)
    for cls in (M3SDA, MFSAN):
        with pytest.raises(uda.UDAError, match=f"{cls.__name__}: no source has a training sample of class 2"):
            make_step({"align": cls()}, missing_classes={"a": [1, 2], "b": [2]})


def test_pairs_part_and_features_bring_them_together(make_step):
    plugin = M3SDA(weight=0.0, pairs=True, discrepancy=0.7)
    model, step = make_step({"align": plugin})
    step.target.features = step.target.x.clone().requires_grad_()
    found = plugin.align_features(step)
    heads = model.head.classifiers
    leaf = step.target.x.clone().requires_grad_()
    gaps = [(heads[i][0](leaf).softmax(1) - heads[i][1](leaf).softmax(1)).abs().sum() / 15 for i in range(2)]
    gap = sum(gaps) / 2
    assert float(found["discrepancy"].detach()) == pytest.approx(-0.7 * float(gap.detach()), rel=1e-5)
    weight = heads[0][1].linear.weight
    got = torch.autograd.grad(found["discrepancy"], [step.target.features, weight])
    plain = torch.autograd.grad(gap, [leaf, weight])
    torch.testing.assert_close(got[0], 0.7 * plain[0])
    torch.testing.assert_close(got[1], -0.7 * plain[1])
    second = sum(F.cross_entropy(heads[i][1](b.x), b.y) for i, b in enumerate(step.sources.values())) / 2
    torch.testing.assert_close(found["second"], second)


def test_branches(make_step):
    """MMD in each branch with the mean distance of all pairs as bandwidth, by loops; the gap over pairs."""
    plugin = MFSAN(hidden=3, ramp="none", kernels=1)
    model, step = make_step({"align": plugin})
    found = plugin.align_features(step)
    model.train()
    values, votes = [], []
    for i, b in enumerate(step.sources.values()):
        s, t = (model.head.branches[i](x).detach().double().numpy() for x in (b.x, step.target.x))
        z = np.concatenate([s, t])
        d = np.array([[((p - q) ** 2).sum() for q in z] for p in z])
        k = np.exp(-d / (d.sum() / (len(z) ** 2 - len(z))))
        n = len(s)
        values.append(k[:n, :n].mean() + k[n:, n:].mean() - 2 * k[:n, n:].mean())
        votes.append(model.head.classifiers[i][0](torch.tensor(t).float()).softmax(1).detach().numpy())
    assert float(found["mmd"].detach()) == pytest.approx(np.mean(values), rel=1e-4)
    assert float(found["agreement"].detach()) == pytest.approx(np.abs(votes[0] - votes[1]).mean(), rel=1e-4)
    logits = [torch.randn(4, 3) for _ in range(3)]
    p = [z.softmax(1) for z in logits]
    mean = sum(float((p[i] - p[j]).abs().mean()) for i in range(3) for j in range(i)) / 3
    assert float(classifier_gap(logits)) == pytest.approx(mean, rel=1e-5)


def test_alignment_does_its_job(make_step):
    """Moments and branches come nearer by gradient steps on the bottleneck."""
    for plugin, name in ((M3SDA(weight=1.0), "moments"), (MFSAN(hidden=4, ramp="none"), "mmd")):
        model, step = make_step({"align": plugin}, bottleneck=6, rows=(30, 30, 30))
        optimizer = torch.optim.SGD(model.bottleneck.parameters(), lr=0.2)
        values = []
        for _ in range(15):
            again = uda.Step(model, {
                "sources": {n: {"x": b.x, "y": b.y} for n, b in step.sources.items()}, "target": {"x": step.target.x},
            }, 0.5, 0, 0)  # fmt: skip
            loss = plugin.align_features(again)[name]
            values.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert values[-1] < 0.8 * values[0]


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("plugin", [MDAN(), DARN(), M3SDA(), MFSAN(), SourceWeights()])
def test_one_source_is_refused(make_step, plugin):
    with pytest.raises(uda.UDAError, match=f"{type(plugin).__name__} needs two sources.*data.source"):
        make_step({"align": plugin}, names=("a",), rows=(6, 5))


@pytest.mark.parametrize(
    ("cls", "arguments", "text"),
    [
        (MDAN, {"mode": "softly"}, "unknown mode.*'soft'"),
        (MDAN, {"sharpness": 0.0}, "sharpness must be positive"),
        (DARN, {"weight": -1.0}, "must not be negative"),
        (M3SDA, {"second": "rew"}, "'raw'"),
        (MFSAN, {"hidden": 0}, "hidden and kernels"),
        (SourceWeights, {"by": "given"}, "give shares with by: given"),
        (SourceWeights, {"by": "given", "shares": {"a": 0.0}}, "nor all zero"),
    ],
)
def test_bad_arguments_are_refused(cls, arguments, text):
    with pytest.raises(uda.UDAError, match=text):
        cls(**arguments)


def test_shares_name_the_sources(make_step):
    for shares, text in (({"a": 1.0, "bb": 1.0}, "no source 'bb'.*'b'"), ({"a": 1.0}, "no share for source 'b'")):
        with pytest.raises(uda.UDAError, match=text):
            make_step({"weights": SourceWeights("given", shares)})


def test_two_plugins_for_one_head_are_refused(make_step):
    class Wraps(uda.Plugin):
        @uda.hookimpl
        def build(self, model):
            model.head = torch.nn.Sequential(model.head)

    for first, second in ((Wraps(), M3SDA()), (M3SDA(), MFSAN()), (MFSAN(), M3SDA(pairs=True))):
        with pytest.raises(uda.UDAError, match="another plugin has replaced it"):
            make_step({"network": first, "align": second})


def test_mdan_under_a_trainer():
    cls, given = CASES[0]
    report = check_plugin(cls, **given, ddp=False, only=["construction", "lifecycle", "checkpoint"])
    assert not report.warnings


def test_sources_of_different_classes_under_a_trainer(tmp_path):
    """What a source lacks reaches the classifiers, and a checkpoint keeps it."""
    x = np.random.default_rng(0).normal(size=(12, 4)).astype("float32")
    labels = {"a": np.arange(12) % 3, "b": np.arange(12) % 2, "t": np.arange(12) % 3}
    np.savez(tmp_path / "d.npz", **{f"{n}_x": x for n in labels}, **{f"{n}_y": y for n, y in labels.items()})
    reader = uda.data.Arrays(str(tmp_path / "d.npz"), kind="features")
    for lacking in (True, False):
        sources = ["a", "b"] if lacking else ["a", "t"]
        data = uda.DataModule(
            reader, sources, "t" if lacking else "b", batch_size=4, epoch_steps=1, allow_missing_classes=True
        )
        model = uda.UDA("identity", {"align": M3SDA()}, bottleneck=4)
        trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                            enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        trainer.fit(model, data)
        assert model.missing_classes == ({"b": [2]} if lacking else {})
        trainer.save_checkpoint(tmp_path / "m.ckpt")
        again = uda.UDA.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
        assert again.head.known.tolist() == [[True] * 3, [True, True, not lacking]]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "given"), CASES)
def test_plugin(cls, given):
    assert not check_plugin(cls, **given, ddp=False).warnings


@pytest.mark.slow
def test_adversary_of_one_source_set_serves_pooled_sources():
    """Methods for one source take several as one pool."""
    from uda_adversarial import CDAN, DANN

    for cls in (DANN, CDAN):
        check_plugin(cls, init_args={"hidden": 8}, sources=2, only=["lifecycle", "liveness"])


@pytest.mark.slow
def test_under_two_processes(tmp_path):
    domains, words = TinyTask("features", 2).domains(), str(tmp_path / "words.pt")
    torch.save({"text": torch.randn(3, 3, 8), "domains": domains, "classes": ["cat", "dog", "fox"]}, words)
    check_plugins_ddp([*CASES, (LanDA, {"init_args": {"prompts": words, "hidden": 8}, **TWO})])
