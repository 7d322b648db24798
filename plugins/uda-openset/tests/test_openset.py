"""Open-set methods against their equations in loops, and on targets with classes of their own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from uda_openset import OSBP, ROS, CoBRF
from uda_openset.cobrf import vote_entropy
from uda_openset.forest import BalancedForest, best_split, information_gain
from uda_openset.osbp import boundary_loss
from uda_openset.ros import masked_mean, normality, rotation_scores
from uda_openset.unknown import unknown_logit

import uda
from uda.testing import check_plugin, check_plugins_ddp

# A rounding of features may give a node another hyperplane, and so a forest other votes.
CASES = [
    (OSBP, {}, {}), (ROS, {"hidden": 8, "split": 0.4}, {"kind": "images"}),
    (CoBRF, {"trees": 2, "depth": 2}, {"precision_tolerance": 0.5}),
]  # fmt: skip


def softmax(z):
    e = np.exp(np.asarray(z) - np.max(z))
    return e / e.sum()


# ------------------------------------------------------------------------------------------------ equations


def test_one_more_logit_is_a_softmax_over_one_more_class():
    draw = np.random.default_rng(0)
    z, u, y = 3 * draw.normal(size=(5, 4)), 3 * draw.normal(size=5), draw.integers(0, 4, 5)
    d = unknown_logit(torch.tensor(z), torch.tensor(u)[:, None])
    for i in range(5):
        p = softmax([*z[i], u[i]])
        assert float(d[i].sigmoid()) == pytest.approx(p[4], rel=1e-9)
        own = -math.log(softmax(z[i])[y[i]]) + float(torch.nn.functional.softplus(d[i]))
        assert own == pytest.approx(-math.log(p[y[i]]), rel=1e-9)
        assert float(torch.nn.functional.softplus(-d[i])) == pytest.approx(-math.log(p[4]), rel=1e-9)


@pytest.mark.parametrize("t", [0.5, 0.2])
def test_boundary_by_loops(t):
    d = torch.tensor([0.3, -2.0, 4.0], dtype=torch.double)
    p = [1 / (1 + math.exp(-v)) for v in d.tolist()]
    expected = np.mean([-t * math.log(q) - (1 - t) * math.log(1 - q) for q in p])
    assert float(boundary_loss(d, t)) == pytest.approx(expected, rel=1e-9)


def test_the_classifier_goes_to_the_boundary_and_features_leave_it():
    plugin, head = OSBP(gamma=0.0), torch.nn.Linear(3, 2)
    torch.manual_seed(0)
    plugin.build(SimpleNamespace(feature_dim=3))
    f = torch.randn(6, 3, requires_grad=True)
    source = SimpleNamespace(logits=head(f.detach()), features=f.detach(), weight=None)
    step = SimpleNamespace(
        target=SimpleNamespace(features=f), sources={"s": source}, progress=0.5,
        model=SimpleNamespace(head=head), domain_mean=lambda d: next(iter(d.values())),
    )  # fmt: skip
    loss = plugin.align_features(step)["boundary"]
    grad_f, grad_u = torch.autograd.grad(loss, [f, plugin.unknown.weight])

    def value(features, shift):
        with torch.no_grad():
            d = unknown_logit(head(features), plugin.unknown(features) + (features @ shift.T))
            return float(boundary_loss(d))

    still, start = torch.zeros(1, 3), float(loss.detach())
    assert value(f.detach() - 0.1 * grad_f, still) > start  # features that descend raise the loss
    assert value(f.detach(), -0.1 * grad_u) < start  # the classifier lowers it


def test_source_weights_count():
    plugin = OSBP()
    plugin.build(SimpleNamespace(feature_dim=3))
    f, z = torch.randn(4, 3), torch.randn(4, 2)
    one = SimpleNamespace(features=f, logits=z, weight=torch.tensor([1.0, 0, 0, 0]))
    step = SimpleNamespace(sources={"s": one}, domain_mean=lambda d: next(iter(d.values())))
    d = unknown_logit(z, plugin.unknown(f))[0]
    torch.testing.assert_close(plugin.source_known(step), torch.nn.functional.softplus(d) / 4)


def test_rotation_scores_by_loops():
    draw = np.random.default_rng(2)
    p = np.stack([[softmax(2 * draw.normal(size=12)) for _ in range(4)] for _ in range(5)])
    o, h = rotation_scores(torch.tensor(p))
    for i in range(5):
        by_class = [sum(p[i, r, 4 * c + r] for r in range(4)) / 4 for c in range(3)]
        assert float(o[i]) == pytest.approx(max(by_class), rel=1e-9)
        assert float(h[i]) == pytest.approx(-sum(v * math.log(v) for v in p[i].ravel()) / 4, rel=1e-9)
    lowest, span = float(h.min()), float(h.max() - h.min())
    expected = [max(float(a), 1 - (float(b) - lowest) / span) for a, b in zip(o, h, strict=True)]
    assert normality(o, h).tolist() == pytest.approx(expected, rel=1e-9)
    expected = [max(float(a), 1 - float(b) / 4) for a, b in zip(o, h, strict=True)]
    assert normality(o, h, top=4.0).tolist() == pytest.approx(expected, rel=1e-9)
    sure = torch.zeros(1, 4, 12).double()
    sure[0, range(4), [8, 9, 10, 11]] = 1.0  # class 2, each rotation right
    assert [float(v) for v in rotation_scores(sure)] == [1.0, 0.0]


def test_masked_mean():
    x = torch.tensor([1.0, 2.0, 6.0])
    assert float(masked_mean(x, torch.tensor([True, False, True]))) == 3.5
    assert float(masked_mean(x, torch.tensor([False] * 3))) == 0.0


def ros_step(y, known):
    """A model of four pixels an image, and a step of one source and the target."""
    torch.manual_seed(0)
    net, head = torch.nn.Linear(4, 5).double(), torch.nn.Linear(5, 2).double()
    plugin = ROS(hidden=6, centre_weight=0.2)
    model = SimpleNamespace(
        feature_dim=5, num_classes=2, input_shape=(1, 2, 2), sizes={"t": len(known)}, target_name="t", head=head,
    )  # fmt: skip
    plugin.build(model)
    plugin.double().known.copy_(torch.tensor(known))

    def batch(rows, y=None):
        x = torch.rand(rows, 1, 2, 2, dtype=torch.double)
        f = net(x.flatten(1))
        return SimpleNamespace(x=x, features=f, logits=head(f), y=y, weight=None, index=torch.arange(rows))

    step = SimpleNamespace(
        sources={"s": batch(len(y), torch.tensor(y))}, target=batch(len(known)), model=model,
        domain_mean=lambda d: next(iter(d.values())),
    )  # fmt: skip
    turned = {id(b): net(b.x.flip(-1).flatten(1)) for b in (step.sources["s"], step.target)}
    plugin.turned = lambda step, b: (turned[id(b)], torch.arange(len(b.x)) % 4)
    return plugin, step, turned


def test_first_stage_of_ros_by_hand():
    plugin, step, turned = ros_step([0, 1, 1, 0, 1], [True] * 4)
    s, out = step.sources["s"], plugin.align_features(step)
    assert set(out) == {"known", "rotation", "centres"}
    v = plugin.source_head.body(torch.cat([s.features, turned[id(s)]], 1))
    z, labels = plugin.source_head.top(v).detach().numpy(), [0, 5, 6, 3, 4]
    expected = -3 * np.mean([math.log(softmax(z[i])[k]) for i, k in enumerate(labels)])
    assert float(out["rotation"].detach()) == pytest.approx(expected, rel=1e-6)
    gap = v - plugin.centres[labels]
    pull, follow = torch.autograd.grad(out["centres"], [s.features, plugin.centres], retain_graph=True)
    by_hand = torch.autograd.grad(gap.square().sum() / 5, [s.features, plugin.centres])
    torch.testing.assert_close(pull, 0.2 * by_hand[0])  # the weight counts for the features alone
    torch.testing.assert_close(follow, by_hand[1])


def test_second_stage_of_ros_by_hand():
    plugin, step, turned = ros_step([0, 1, 1], [True, False, False, True])
    plugin.scored.fill_(True)
    t, out = step.target, plugin.align_features(step)
    z = torch.cat([t.logits, plugin.unknown(t.features)], 1).detach().numpy()
    p = [softmax(row) for row in z]
    assert float(out["unknown"].detach()) == pytest.approx(-math.log(p[1][2] * p[2][2]) / 2, rel=1e-6)  # 2 / K is 1
    h = [-(q * np.log(q)).sum() for q in p]
    assert float(out["entropy"].detach()) == pytest.approx(0.1 * (h[0] + h[3]) / 2, rel=1e-6)
    turns = plugin.target_head(t.features, turned[id(t)])[0].detach().numpy()
    expected = -3 * (math.log(softmax(turns[0])[0]) + math.log(softmax(turns[3])[3])) / 2
    assert float(out["rotation"].detach()) == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(out["unknown"], t.features)[0].abs().sum(1).gt(0).tolist() == [False, True, True, False]


def surprise(counts):
    p = [c / sum(counts) for c in counts if c]
    return -sum(v * math.log(v) for v in p)


def test_information_gain_by_loops():
    left, right = [3.0, 1.0, 0.0], [1.0, 0.0, 4.0]
    both = [a + b for a, b in zip(left, right, strict=True)]
    expected = surprise(both) - 4 / 9 * surprise(left) - 5 / 9 * surprise(right)
    assert float(information_gain(torch.tensor(left), torch.tensor(right))) == pytest.approx(expected, rel=1e-6)


def test_best_split_halves_the_source_and_minds_the_target():
    torch.manual_seed(0)
    y = torch.tensor([0, 0, 1, 1])
    x = torch.tensor([[0.0, 0.0, 5.0], [1.0, 1.0, 6.0], [4.0, 4.0, 7.0], [5.0, 5.0, 5.5]])
    one_hot = torch.nn.functional.one_hot(y).float()
    target = torch.tensor([[0.0, 9.0, 0.0], [9.0, 9.0, 0.0]])
    planes = torch.eye(3)  # the first two part the classes; only the first parts the target as well
    plane, threshold, spread = best_split(x, one_hot, target, planes[[2, 1, 0]], alignment=1.0)
    assert plane.tolist() == [1.0, 0.0, 0.0]
    assert float(threshold) == 2.5
    assert float(spread) == pytest.approx(np.std([0, 1, 4, 5]), rel=1e-6)
    assert best_split(x, one_hot, target, planes[[2, 1, 0]], alignment=0.0)[0].tolist() == [0.0, 1.0, 0.0]


def grown(n=64, **options):
    torch.manual_seed(1)
    forest = BalancedForest(4, 3, trees=3, depth=3, **options)
    y = torch.arange(n) % 3
    x = torch.randn(n, 4) * 0.3 + 2 * torch.eye(4)[y]
    forest.grow(x, y, torch.randn(20, 4))
    return forest, x, y


def test_the_way_through_the_trees_by_loops():
    forest, x, _ = grown()
    x = x[:5].double()
    reached, right, ends = forest.route(x)
    for b in range(5):
        for t in range(3):
            share = {0: 1.0}
            for m in range(7):
                z = float(x[b] @ forest.planes[t, m].double() - forest.thresholds[t, m])
                g = 1 / (1 + math.exp(-z / (0.2 * float(forest.spreads[t, m]))))
                share[2 * m + 1], share[2 * m + 2] = share[m] * (1 - g), share[m] * g
                assert float(reached[b, t, m]) == pytest.approx(share[m], abs=1e-6)
                assert float(right[b, t, m]) == pytest.approx(g, abs=1e-6)
            assert ends[b, t].tolist() == pytest.approx([share[m] for m in range(7, 15)], abs=1e-6)
    by_hand = sum(ends[:, t] @ forest.leaves[t].double() for t in range(3)) / 3
    torch.testing.assert_close(forest.votes(x), by_hand)
    share = (reached * right).sum(0) / reached.sum(0)
    assert float(forest.unevenness(x)) == pytest.approx(float(((2 * share - 1) ** 2).mean()))


def test_forest_is_balanced_and_right():
    forest, x, y = grown()
    hard = grown(softness=1e-4)[0].route(x)[2].sum(0)  # samples by leaf of each tree
    assert hard.min() >= 2  # 64 samples on 8 leaves, but for the bootstrap
    assert float((forest.votes(x).argmax(1) == y).float().mean()) > 0.9
    torch.testing.assert_close(forest.votes(x).sum(1), torch.ones(len(x)))
    h = vote_entropy(torch.tensor([[1.0, 0.0, 0.0], [1 / 3] * 3]))
    assert h.tolist() == pytest.approx([0, 1], abs=1e-6)


def test_features_descend_to_what_the_forest_tells():
    forest, x, y = grown()
    f = (x + torch.randn_like(x)).requires_grad_()
    loss = -forest.votes(f)[range(len(y)), y].log().mean() + forest.unevenness(f)
    step = f.detach() - 0.5 * torch.autograd.grad(loss, f)[0]
    assert float(-forest.votes(step)[range(len(y)), y].log().mean() + forest.unevenness(step)) < float(loss.detach())


def test_a_forest_of_few_samples_grows():
    forest = BalancedForest(2, 2, trees=1, depth=3)
    forest.grow(torch.randn(3, 2), torch.tensor([0, 1, 1]), torch.randn(0, 2))
    assert forest.votes(torch.randn(4, 2)).isfinite().all()


# ------------------------------------------------------------------------------------------------ what they do


def fitted(plugins, epochs=4, **options):
    """Known classes 0 to 2, target-private 3 to 5; figures on the target."""
    torch.manual_seed(0)
    data = uda.DataModule(
        uda.data.Generated("blobs", classes=6, n=360, features=8, noise=0.3, seed=4), "source", "target", seed=0,
        setting="open", classes={"known": 3, "target_private": 3}, batch_size=32, epoch_steps=20, **options,
    )  # fmt: skip
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", devices=1, **dict.fromkeys(off, False))
    model = uda.UDA("mlp", plugins, bottleneck=16)
    trainer.fit(model, data)
    return model, {k: float(v) for k, v in trainer.callback_metrics.items()}


def test_osbp_finds_unknown_classes():
    model, figures = fitted({"align": OSBP()})
    assert figures["oracle/h_score"] > 0.5
    batch = model.eval().batch(torch.randn(20, 8))
    marked = model.predict_batch(batch)
    assert marked.label.max() < 3
    z = torch.cat([batch.logits, model.plugins["align"].unknown(batch.features)], 1)
    torch.testing.assert_close(marked.unknown, z.argmax(1) == 3)


def test_bad_arguments():
    for make in (
        lambda: OSBP(weight=-1.0), lambda: OSBP(threshold=1.0), lambda: OSBP(gamma=-1.0),
        lambda: ROS(split=1.0), lambda: ROS(entropy_scale="max"), lambda: ROS(hidden=0),
        lambda: CoBRF(quantile=1.0), lambda: CoBRF(depth=11), lambda: CoBRF(weight=-1.0),
    ):  # fmt: skip
        with pytest.raises(uda.UDAError):
            make()
    with pytest.raises(uda.UDAError, match="square"):
        ROS().build(SimpleNamespace(input_shape=(6,)))


# ------------------------------------------------------------------------------------------------ lifecycle


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "options", "kit"), CASES)
def test_plugin(cls, options, kit):
    check_plugin(cls, init_args=options, ddp=False, **kit)


@pytest.mark.slow
def test_under_two_processes():
    tasks = [(cls, options, {k: v for k, v in kit.items() if k == "kind"}) for cls, options, kit in CASES]
    check_plugins_ddp([(cls, {"init_args": options, **kind}) for cls, options, kind in tasks])
