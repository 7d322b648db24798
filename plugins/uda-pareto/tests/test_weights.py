"""Weights against naive calculations: grids over the simplex, projections vector by vector."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_pareto import MGDA, CAGrad, FixedWeights, PCGrad, UncertaintyWeights
from uda_pareto.cagrad import cagrad
from uda_pareto.mgda import min_norm
from uda_pareto.pcgrad import pcgrad
from uda_pareto.preference import descent, guided, maximise

import uda

SEEDS = range(12)


def gradients(seed: int, k: int = 3, n: int = 5) -> np.ndarray:
    """K gradients of different lengths, many of them in conflict."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(k, n)) * draw.uniform(0.1, 4, size=(k, 1))


def grid(k: int = 3, parts: int = 60) -> np.ndarray:
    """All points of the simplex with coordinates in steps of 1 / parts."""
    points = [p for p in itertools.product(range(parts + 1), repeat=k - 1) if sum(p) <= parts]
    return np.array([(*p, parts - sum(p)) for p in points]) / parts


@pytest.mark.parametrize("seed", SEEDS)
def test_min_norm_is_the_shortest_combination(seed):
    g = gradients(seed)
    a = min_norm(g @ g.T)
    assert a.min() >= 0
    assert a.sum() == pytest.approx(1)
    d = a @ g
    assert d @ d <= min(np.square(grid() @ g).sum(1)) + 1e-9
    assert (g @ d >= d @ d - 1e-8 * np.abs(g).max()).all()  # a descent direction for every objective


@pytest.mark.parametrize("seed", SEEDS)
def test_min_norm_of_two_in_closed_form(seed):
    u, v = gradients(seed, 2)
    share = np.clip((v @ v - u @ v) / ((u - v) @ (u - v)), 0, 1)
    g = np.stack([u, v])
    np.testing.assert_allclose(min_norm(g @ g.T), [share, 1 - share], atol=1e-7)


@pytest.mark.parametrize("seed", SEEDS)
def test_pcgrad_against_vectors(seed):
    g = gradients(seed, 4)
    draw = random.Random(seed)
    orders = [draw.sample([j for j in range(4) if j != i], 3) for i in range(4)]
    total = np.zeros(5)
    for i, order in enumerate(orders):
        mine = g[i].copy()
        for j in order:
            if mine @ g[j] < 0:
                mine -= (mine @ g[j]) / (g[j] @ g[j]) * g[j]
        total += mine
    np.testing.assert_allclose(pcgrad(g @ g.T, orders) @ g, total, atol=1e-9)


@pytest.mark.parametrize("c", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("seed", SEEDS)
def test_cagrad_has_the_best_worst_case_near_the_mean(seed, c):
    g = gradients(seed)
    d = cagrad(g @ g.T, c, "none") @ g
    mean = g.mean(0)
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(d - mean) == pytest.approx(radius, rel=1e-3, abs=1e-6)
    combined = grid() @ g  # the dual on a grid bounds the worst case of any direction in the ball from above
    bound = min(combined @ mean + radius * np.linalg.norm(combined, axis=1))
    assert (g @ d).min() == pytest.approx(bound, abs=0.03 * np.abs(g @ g.T).max())
    np.testing.assert_allclose(cagrad(g @ g.T, c, "squared") * (1 + c**2), cagrad(g @ g.T, c, "none"))


def best_on_grid(value, rows, floor):
    points = grid()
    feasible = points[(points @ rows.T >= floor - 1e-9).all(1)]
    return (feasible @ value).max() if len(feasible) else -np.inf


@pytest.mark.parametrize("seed", SEEDS)
def test_guided_weights_beat_the_simplex_grid(seed):
    g = gradients(seed)
    guide = g @ np.random.default_rng(100 + seed).normal(size=5)
    gram = g @ g.T
    floor = []
    for j in range(3):  # the conditions one by one
        if not any(guide > 0) or j == int(np.argmax(guide)):
            floor.append(0.0)
        else:
            floor.append(-np.inf if guide[j] > 0 else guide[j])
    a = guided(gram, guide)
    assert (gram @ a >= np.array(floor) - 1e-6 * np.abs(gram).max()).all()
    assert a.sum() == pytest.approx(1)
    assert a @ guide >= best_on_grid(guide, gram, np.array(floor)) - 1e-6 * np.abs(guide).max()


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_weights_beat_the_simplex_grid(seed):
    g = gradients(seed)
    guide = g @ np.random.default_rng(200 + seed).normal(size=5)
    gram = g @ g.T
    a = descent(gram, guide)
    assert (gram @ a >= -1e-6 * np.abs(gram).max()).all()
    rows, floor = np.vstack([gram, guide]), np.array([0, 0, 0, min(guide.max(), 0)])
    assert gram.sum(0) @ a >= best_on_grid(gram.sum(0), rows, floor) - 1e-6 * np.abs(gram).max()


def test_programs_at_any_size_of_the_gradients():
    g, guide = gradients(3), np.array([0.5, -0.2, 0.1])
    for size in (1e-9, 1e6):
        np.testing.assert_allclose(guided(size**2 * g @ g.T, size**2 * guide), guided(g @ g.T, guide), atol=1e-6)
    assert maximise(np.ones(2), -np.ones((1, 2)), np.array([1.0])) is None
    np.testing.assert_allclose(guided(g @ g.T, np.zeros(3)), min_norm(g @ g.T))


class Fake(dict):
    """Objectives whose Gram matrix is given."""

    def __init__(self, g, losses=(1.0, 2.0, 3.0)):
        super().__init__(zip("abc", map(torch.tensor, losses), strict=True))
        self.matrix = torch.tensor(g @ g.T)

    def gram(self, level=None):
        return self.matrix


def weigh(plugin, g, index=0, **options):
    step = SimpleNamespace(model=SimpleNamespace(base_seed=1), index=index)
    return plugin.weigh_objectives(step, Fake(g, **options))


@pytest.mark.parametrize("plugin", [MGDA(), PCGrad(), CAGrad()])
def test_an_objective_that_does_not_pull_takes_no_weight(plugin):
    g = gradients(1)
    g[1] = 0
    weights = weigh(plugin, g)
    pair = Fake(g).matrix.numpy()[np.ix_([0, 2], [0, 2])]
    assert weights["b"] == 1
    assert weights["a"] > 0 or weights["c"] > 0
    if isinstance(plugin, MGDA):
        np.testing.assert_allclose([weights["a"], weights["c"]], 2 * min_norm(pair), atol=1e-7)


@pytest.mark.parametrize("plugin", [MGDA(), PCGrad(), CAGrad()])
def test_overflow_takes_the_plain_sum(plugin):
    g = gradients(1)
    g[0, 0] = np.inf
    assert weigh(plugin, g) is None


@pytest.mark.parametrize("normalise", ["l2", "loss", "loss+"])
def test_mgda_normalises(normalise):
    g, losses = gradients(2), np.array([1.0, 2.0, 3.0])
    length = np.linalg.norm(g, axis=1)
    scaled = g / {"l2": length, "loss": losses, "loss+": length * losses}[normalise][:, None]
    expected = min_norm(scaled @ scaled.T)
    got = weigh(MGDA(normalise=normalise, keep_scale=False), g)
    np.testing.assert_allclose(list(got.values()), expected, atol=1e-7)


def test_order_of_pcgrad_is_a_function_of_seed_and_step():
    g = gradients(7)
    torch.manual_seed(1)
    one = [weigh(PCGrad(), g, i) for i in range(6)]
    torch.manual_seed(2)
    assert one == [weigh(PCGrad(), g, i) for i in range(6)]


def test_learnt_weights_learn_the_published_gradient():
    plugin = UncertaintyWeights(["a", "b"], start=0.4)
    weights = plugin.weigh_objectives()
    loss = sum(w * x for w, x in zip(weights.values(), (2.0, 0.3), strict=True))
    (loss + plugin.refine_classifier()["log_variance"]).backward()
    expected = [0.5 - np.exp(-0.4) * 2.0, 0.5 - np.exp(-0.4) * 0.3]
    np.testing.assert_allclose(plugin.log_variance.grad, expected, rtol=1e-5)
    (group,) = plugin.param_groups()
    assert group["weight_decay"] == 0
    with torch.no_grad():
        plugin.log_variance.fill_(9.0)
        plugin.after_step()
    assert plugin.log_variance.tolist() == [5.0, 5.0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: MGDA(normalise="l3"), "unknown normalise"),
        (lambda: PCGrad(level="feature"), "'feature'.*features"),
        (lambda: CAGrad(c=1.0), "in \\[0, 1\\)"),
        (lambda: CAGrad(rescale="half"), "rescale"),
        (lambda: FixedWeights({"a": -1.0}), "0 or more"),
        (lambda: UncertaintyWeights(["a", "a"]), "distinct"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(uda.UDAError, match=text):
        make()
