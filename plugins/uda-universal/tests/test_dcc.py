"""DCC: matching, consensus and losses against loops; what it finds on targets with classes of their own."""

from __future__ import annotations

import math
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from uda_universal import DCC
from uda_universal.dcc import cluster_loss, moved_centres
from uda_universal.matching import candidates, consensus_scores, match, mutual_pairs, nearest, unit_centres

import uda
from uda.testing import check_plugin


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def drawn(seed=0, n=30, m=24, c=4, k=5, f=6):
    draw = np.random.default_rng(seed)
    s, t = unit(draw.normal(size=(n, f))), unit(draw.normal(size=(m, f)))
    y, code = np.arange(n) % c, np.arange(m) % k
    centres = [unit(np.stack([x[z == i].sum(0) for i in range(j)])) for x, z, j in ((s, y, c), (t, code, k))]
    return s, y, centres[0], t, code, centres[1]


def test_pairs_and_consensus_by_loops():
    for seed in range(5):
        s, y, cs, t, code, ct = drawn(seed)
        cosine = cs @ ct.T
        expected = [-1] * 5
        for k in range(5):
            c = int(cosine[:, k].argmax())
            if int(cosine[c].argmax()) == k:
                expected[k] = c
        partner = mutual_pairs(torch.tensor(cs), torch.tensor(ct))
        assert partner.tolist() == expected
        scores = []
        for k, c in enumerate(expected):
            if c >= 0:
                to = [(x @ ct.T).argmax() == k for x in s[y == c]]
                back = [(x @ cs.T).argmax() == c for x in t[code == k]]
                scores.append((np.mean(to) + np.mean(back)) / 2)
        arguments = (s, y, cs, t, code, ct)
        got = consensus_scores(*(torch.tensor(a).float() if a.dtype == float else torch.tensor(a) for a in arguments),
                               partner)  # fmt: skip
        assert got.tolist() == pytest.approx(scores, abs=1e-6)


def test_nearest_in_chunks_and_centres():
    x, c = torch.randn(11, 3), torch.randn(4, 3)
    whole = torch.nn.functional.cosine_similarity(x[:, None], c[None], dim=2).argmax(1)
    assert nearest(x, c, rows=3).tolist() == whole.tolist()
    centres = unit_centres(x, torch.tensor([0, 1] * 5 + [0]), 3)
    torch.testing.assert_close(centres[1], torch.nn.functional.normalize(x[1:10:2].sum(0), dim=0))
    assert not centres[2].any()


def test_the_best_number_of_clusters_is_found():
    """Two classes in common, one of the source and three of the target alone, all well apart."""
    draw = np.random.default_rng(0)
    means = 4 * np.eye(6)
    s = np.concatenate([means[[i]] + 0.3 * draw.normal(size=(20, 6)) for i in (0, 1, 2)])
    t = np.concatenate([means[[i]] + 0.3 * draw.normal(size=(20, 6)) for i in (0, 1, 3, 4, 5)])
    y = torch.arange(3).repeat_interleave(20)
    found = match(torch.tensor(s), y, torch.tensor(t), 3, candidates(2, 1, 9), falls=0, starts=3)
    assert set(found.scores) == set(range(2, 10))
    assert found.score == pytest.approx(max(found.scores.values()))
    label = found.partner[found.code].reshape(5, 20)
    assert label[0].tolist() == [0] * 20
    assert label[1].tolist() == [1] * 20
    few = match(torch.tensor(s), y, torch.tensor(t), 3, [5], starts=3, min_samples=20)
    assert (few.partner == -1).all()
    gap = match(torch.tensor(s), 2 * y, torch.tensor(t), 6, [5], starts=3)  # classes 1, 3 and 5 have no sample
    assert gap.partner[gap.code].reshape(5, 20)[1].tolist() == [2] * 20


def test_search_stops_after_falls():
    s, y, _, t, *_ = drawn(n=60, m=60)
    every = match(torch.tensor(s), torch.tensor(y), torch.tensor(t), 4, candidates(2, 1, 20), falls=0)
    values = list(every.scores.values())
    stop = next(i for i in range(2, len(values)) if values[i] < values[i - 1] < values[i - 2])
    short = match(torch.tensor(s), torch.tensor(y), torch.tensor(t), 4, candidates(2, 1, 20), falls=2)
    assert list(short.scores.values()) == values[: stop + 1]


def test_cluster_loss_by_loops_and_descent():
    draw = np.random.default_rng(0)
    f, m, code = draw.normal(size=(5, 3)), unit(draw.normal(size=(4, 3))), [0, 2, 1, 2, 0]
    expected = 0.0
    for x, k in zip(f, code, strict=True):
        z = unit(x) @ m[:3].T / 0.2
        expected -= (z[k] - math.log(np.exp(z).sum())) / 5
    x = torch.tensor(f, requires_grad=True)
    got = cluster_loss(x, torch.tensor(m), torch.tensor(3), torch.tensor(code), 0.2)
    assert float(got.detach()) == pytest.approx(expected, rel=1e-9)
    (grad,) = torch.autograd.grad(got, [x])
    assert cluster_loss(x - 0.1 * grad, torch.tensor(m), torch.tensor(3), torch.tensor(code), 0.2) < got


def test_centres_follow_their_batch():
    m = torch.nn.functional.normalize(torch.randn(3, 4), dim=1)
    x = torch.nn.functional.normalize(torch.randn(5, 4), dim=1)
    code = torch.tensor([0, 0, 2, 2, 2])
    moved = moved_centres(m, x, code)
    for k in range(3):
        if k == 1:
            expected = m[1]
        else:
            b = torch.nn.functional.normalize(x[code == k].sum(0), dim=0)
            expected = torch.nn.functional.normalize((m[k] @ b) * m[k] + (1 - m[k] @ b) * b, dim=0)
        torch.testing.assert_close(moved[k], expected)


def test_finds_unknown_classes(universal_fit):
    model, _, figures = universal_fit({"align": DCC(refresh_every=20)}, epochs=3, forward_mode="separate")
    assert figures["oracle/os_star"] > 0.8
    assert figures["oracle/unk"] > 0.3
    plugin = model.plugins["align"]
    assert 0 < int(plugin.count[0]) <= len(plugin.centres)
    assert int((plugin.partner >= 0).sum()) <= 4


def test_searches_of_the_warm_up_settle_nothing():
    source, y, _, target, *_ = drawn(n=60, m=80)
    model = SimpleNamespace(
        num_classes=4, base_seed=0, feature_dim=6, sizes={"t": len(target)}, target_name="t", progress=0.0
    )
    dcc, searched = DCC(warmup=0.1, step=1, starts=1), []
    dcc.build(model)
    for progress in (0.0, 0.05, 0.2, 0.3):
        model.progress = progress
        with mock.patch("uda_universal.dcc.match", side_effect=match) as asked:
            dcc.cluster(model, *map(torch.as_tensor, (source, y, target)))
        searched.append(not isinstance(asked.call_args.args[4], list))  # else a list of one number
    assert all(searched[:3])  # the two of the warm-up agreed on 0
    dcc.count[:] = torch.tensor([5, 5, 5])
    with mock.patch("uda_universal.dcc.match", side_effect=match) as asked:
        dcc.cluster(model, *map(torch.as_tensor, (source, y, target)))
    assert asked.call_args.args[4] == [5]


def test_bad_arguments():
    for options in ({"weight": -1.0}, {"temperature": 0.0}, {"max_search": 0}, {"warmup": 1.0}):
        with pytest.raises(uda.UDAError):
            DCC(**options)


@pytest.mark.slow
def test_dcc_plugin():
    report = check_plugin(DCC, init_args={"refresh_every": 2}, ddp=False)
    assert sorted(report.objectives) == ["cdd", "clusters"]
