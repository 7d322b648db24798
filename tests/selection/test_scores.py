"""Each score against an independent derivation, in batches, and under the changes that must not matter."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import uda
from uda import selection
from uda.selection.mixing import mix, partners

spec = importlib.util.spec_from_file_location("naive", Path(__file__).with_name("naive.py"))
naive = importlib.util.module_from_spec(spec)
spec.loader.exec_module(naive)

N, C, F, M = 37, 4, 6, 23


@pytest.fixture
def pool():
    random = torch.Generator().manual_seed(3)
    y = torch.arange(N) % C
    logits = 2 * torch.randn(N, C, generator=random) + 2 * torch.nn.functional.one_hot(y, C)
    features = torch.randn(N, F, generator=random)
    features[:, :C] += 2 * torch.nn.functional.one_hot(logits.argmax(1), C)
    source = torch.randn(M, F, generator=random) + 0.5
    source_logits = torch.randn(M, C, generator=random)
    vectors = torch.randn(C, F, generator=random)
    return selection.ScorePool(features, logits, source, source_logits, torch.arange(M) % C, vectors, seed=1)


def array(x):
    return x.double().numpy()


CHEAP = ["negative_entropy", "diversity", "information_maximisation", "bnm", "class_correlation"]


@pytest.mark.parametrize("name", [*CHEAP, "soft_neighbourhood_density"])
def test_scores_of_logits(pool, name):
    found = getattr(selection, name)(pool.target_logits)
    assert float(found) == pytest.approx(getattr(naive, name)(array(pool.target_logits)), rel=1e-5)


def test_few_samples_and_many_classes(pool):
    logits = pool.target_logits[:3]
    assert float(selection.bnm(logits)) == pytest.approx(naive.bnm(array(logits)), rel=1e-6)


def test_rankme(pool):
    for x in (pool.target_features, pool.target_features[:3]):  # more rows than columns, and fewer
        assert float(selection.rankme(x)) == pytest.approx(naive.rankme(array(x)), rel=1e-5)


def test_density_ratio_and_weighted_validation(pool):
    source, target = pool.source_features, pool.target_features
    w = selection.density_ratio(source, target, source)
    plain = naive.density_ratio(array(source), array(target), array(source))
    assert np.allclose(w, plain, rtol=2e-3)
    errors = (pool.source_logits.argmax(1) != pool.source_y).double()
    assert 0 < errors.mean() < 1
    assert float(selection.iwv(w, errors)) == pytest.approx(naive.iwv(w, errors), rel=1e-9)
    assert float(selection.dev(w, errors)) == pytest.approx(naive.dev(w, errors), rel=1e-9)
    assert float(selection.dev(torch.ones(M), errors)) == pytest.approx(-float(errors.mean()))


def test_weights_come_from_a_classifier_that_has_not_seen_the_row(pool):
    w = selection.cross_fitted_weights(pool.source_features, pool.target_features, folds=2, seed=5)
    part = (torch.arange(M) % 2)[torch.randperm(M, generator=torch.Generator().manual_seed(5))]
    for i in range(M):
        others = pool.source_features[part != part[i]]
        assert len(others) in (M // 2, M - M // 2)
        own = selection.density_ratio(others, pool.target_features, pool.source_features[i : i + 1])
        assert float(w[i]) == pytest.approx(float(own), rel=1e-6)


def test_class_clusters(pool):
    found = selection.class_clusters(pool.target_features, pool.target_logits)
    assert 0.2 < float(found) < 1
    assert float(found) == pytest.approx(
        naive.class_clusters(array(pool.target_features), array(pool.target_logits)), rel=1e-6
    )


def test_class_clusters_with_a_class_that_is_never_predicted(pool):
    logits = torch.cat((pool.target_logits, torch.full((N, 1), -9.0)), 1)
    assert -1 < float(selection.class_clusters(pool.target_features, logits)) < 1
    one = torch.zeros(N, C)
    one[:, 2] = 1
    assert float(selection.class_clusters(pool.target_features, one)) == 0


def test_transfer_score(pool):
    x, w = pool.target_features, pool.class_vectors
    uneven = float(selection.classifier_unevenness(w))
    assert uneven == pytest.approx(naive.classifier_unevenness(array(w)), rel=1e-6)
    random = torch.Generator().manual_seed(7)  # what the function draws, drawn again
    low, high = x.double().min(0).values, x.double().max(0).values
    points = low + (high - low) * torch.rand(9, F, generator=random, dtype=torch.float64)
    chosen = torch.randperm(N, generator=random)[:9].tolist()
    tendency = naive.hopkins(array(x), points.numpy(), chosen)
    assert float(selection.hopkins(x, share=0.25, seed=7)) == pytest.approx(tendency, rel=1e-6)
    total = selection.transfer_score(x, pool.target_logits, w, seed=7)
    mutual = naive.information_maximisation(array(pool.target_logits)) / math.log(C)
    assert float(total) == pytest.approx(-uneven + float(selection.hopkins(x, seed=7)) + mutual, rel=1e-6)
    without = selection.transfer_score(x, pool.target_logits, None, seed=7)  # of a classifier that is not linear
    assert float(without - total) == pytest.approx(uneven, rel=1e-6)


def test_a_simplex_is_even_and_clusters_tend_to_cluster():
    simplex = torch.eye(C) - 1 / C
    assert float(selection.classifier_unevenness(simplex)) == pytest.approx(0, abs=1e-6)
    random = torch.Generator().manual_seed(0)
    even = torch.rand(400, 2, generator=random)
    tight = torch.randint(0, 2, (400, 2), generator=random) + 0.01 * torch.randn(400, 2, generator=random)
    assert float(selection.hopkins(even, share=0.5)) == pytest.approx(0.5, abs=0.1)
    assert float(selection.hopkins(tight, share=0.5)) > 0.95


def test_mixval_partners_and_rates():
    labels = torch.tensor([0, 0, 1, 2, 1, 1, 3])
    for same in (True, False):
        expected = [naive.partner(labels.tolist(), i, same) for i in range(7)]
        assert partners(labels, same).tolist() == expected
    assert partners(labels[:1], True).tolist() == [-1]
    x = torch.tensor([[0.0], [10.0]])
    assert mix(x, torch.tensor([1, 0]), 0.6).flatten().tolist() == pytest.approx([4.0, 6.0])
    with pytest.raises(uda.UDAError, match="whole numbers"):
        mix(torch.tensor([[1], [2]]), torch.tensor([1, 0]))
    metric = selection.MixVal()
    metric.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), 0)
    metric.update(torch.tensor([0, 1]), torch.tensor([1, 1]), 1)
    metric.update(torch.tensor([2, 1]), torch.tensor([0, 0]), 1)
    assert float(metric.compute()) == pytest.approx((2 / 3 + 1 / 4) / 2)
    agree = torch.tensor([True, True, False]), torch.tensor([False, True, False, False])
    assert float(selection.mixval(*agree)) == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert float(selection.mixval(agree[0], agree[1][:0])) == pytest.approx(2 / 3)


POOL_SCORES = [n for n, cls in selection.SCORES.items() if cls.reads == "pool"]


@pytest.mark.parametrize("name", [n for n, cls in selection.SCORES.items() if cls.reads == "sums"])
def test_batches_add_up_to_the_whole_for_sums(pool, name):
    metric = selection.SCORES[name]()
    for part in pool.target_logits.split(5):
        metric.update(part)
    metric.update(pool.target_logits[:0])
    whole = selection.SCORES[name].score(selection.Sums.of(pool.target_logits))
    assert float(metric.compute()) == pytest.approx(float(whole), rel=1e-9)


@pytest.mark.parametrize("name", POOL_SCORES)
def test_batches_add_up_to_the_whole_for_pools(pool, name):
    metric = selection.SCORES[name](class_vectors=pool.class_vectors, seed=1)
    for f, z in zip(pool.target_features.split(7), pool.target_logits.split(7), strict=True):
        metric.update(f, z)
    for start in range(0, M, 6):
        rows = slice(start, start + 6)
        metric.update(pool.source_features[rows], pool.source_logits[rows], pool.source_y[rows])
    assert float(metric.compute()) == pytest.approx(float(selection.SCORES[name].score(pool)), rel=1e-6)


@pytest.mark.parametrize("name", ["im", "bnm", "snd", "dev"])
def test_metrics_of_two_processes_merge(pool, name):
    one, other, whole = (selection.SCORES[name]() for _ in range(3))
    if selection.SCORES[name].reads == "sums":
        for metric, rows in ((one, slice(0, 20)), (other, slice(20, None)), (whole, slice(None))):
            metric.update(pool.target_logits[rows])
    else:
        for metric, rows in ((one, slice(0, 20)), (other, slice(20, None)), (whole, slice(None))):
            metric.update(pool.target_features[rows], pool.target_logits[rows])
            metric.update(pool.source_features[rows], pool.source_logits[rows], pool.source_y[rows])
    other.merge_state(one)
    assert float(other.compute()) == pytest.approx(float(whole.compute()), rel=1e-6)


@pytest.mark.parametrize("name", ["snd", "rankme", "class_cluster"])
def test_the_order_of_samples_does_not_matter(pool, name):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    other = selection.ScorePool(
        pool.target_features[order], pool.target_logits[order], pool.source_features, pool.source_logits,
        pool.source_y,
    )  # fmt: skip
    score = selection.SCORES[name].score
    assert float(score(other)) == pytest.approx(float(score(pool)), rel=1e-5)


@pytest.mark.parametrize("name", [*CHEAP, "soft_neighbourhood_density"])
def test_constants_added_to_logits_and_names_of_classes_do_not_matter(pool, name):
    score, z = getattr(selection, name), pool.target_logits
    moved = z + torch.randn(N, 1, generator=torch.Generator().manual_seed(1))
    assert float(score(moved)) == pytest.approx(float(score(z)), rel=1e-5)
    assert float(score(z[:, [2, 0, 3, 1]])) == pytest.approx(float(score(z)), rel=1e-6)


def test_ranges_and_signs():
    y = torch.arange(40) % C
    right = 40.0 * torch.nn.functional.one_hot(y, C)  # confident and balanced
    blind, one = torch.zeros(40, C), 40.0 * torch.nn.functional.one_hot(torch.zeros(40, dtype=torch.long), C)
    values = {n: [float(getattr(selection, n)(z)) for z in (right, blind, one)] for n in CHEAP}
    top = math.log(C)
    assert values["negative_entropy"] == pytest.approx([0, -top, 0], abs=1e-6)
    assert values["diversity"] == pytest.approx([top, top, 0], abs=1e-6)
    assert values["information_maximisation"] == pytest.approx([top, 0, 0], abs=1e-6)
    assert values["bnm"] == pytest.approx([1, 0.25, 0.5], abs=1e-6)
    assert values["class_correlation"] == pytest.approx([1, 0.5, 0.5], abs=1e-6)
    density = [float(selection.soft_neighbourhood_density(z)) for z in (right, blind, one)]
    assert density == pytest.approx([math.log(9), math.log(39), math.log(39)], abs=1e-3)
    assert float(selection.rankme(torch.eye(5).repeat(3, 1))) == pytest.approx(5, rel=1e-4)


def test_extreme_logits_are_no_trouble():
    z = torch.tensor([[1e4, -1e4, 0.0], [0.0, 1e4, -1e4]])
    for name in CHEAP:
        assert math.isfinite(float(getattr(selection, name)(z)))
    half = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for name in CHEAP:
        exact = float(getattr(selection, name)(half.bfloat16().double()))
        assert float(getattr(selection, name)(half.bfloat16())) == pytest.approx(exact, rel=1e-9)


def test_similarities_in_chunks(pool, monkeypatch):
    whole = float(selection.soft_neighbourhood_density(pool.target_logits))
    monkeypatch.setattr("uda.selection.density._CHUNK", 5 * N)
    assert float(selection.soft_neighbourhood_density(pool.target_logits)) == pytest.approx(whole, rel=1e-6)


def test_bad_input_is_told():
    with pytest.raises(uda.UDAError, match="shape"):
        selection.bnm(torch.zeros(4))
    with pytest.raises(uda.UDAError, match="two rows"):
        selection.soft_neighbourhood_density(torch.zeros(1, 3))
    with pytest.raises(uda.UDAError, match="source validation"):
        selection.density_ratio(torch.zeros(0, 3), torch.zeros(4, 3), torch.zeros(1, 3))
    with pytest.raises(uda.UDAError, match="at least 4"):
        selection.cross_fitted_weights(torch.zeros(3, 3), torch.zeros(4, 3))
    with pytest.raises(uda.UDAError, match=r"\(5, 1\) and \(5,\)"):
        selection.dev(torch.ones(5, 1), torch.ones(5))
    lonely = selection.ScorePool(*(torch.zeros(1, 3) for _ in range(4)), torch.zeros(1))
    assert selection.TransferScore.score(lonely).isnan()  # one sample has no neighbour
