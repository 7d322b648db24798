"""Which validation is taken, the vote, and the collapse guard."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import uda
from uda.selection import CollapseGuard, collapse, monitor_value, needed_scores, select_epoch, vote
from uda.selection.choose import running_choice


def rows(collapsed=None, **scores):
    n = len(next(iter(scores.values())))
    flags = collapsed or [0] * n
    return [
        {"epoch": i, "select/collapsed": flags[i], **{f"select/{k}": v[i] for k, v in scores.items()}} for i in range(n)
    ]


def test_one_score_takes_the_first_best():
    assert select_epoch(rows(im=[0.1, 0.7, 0.3, 0.7]), "im") == 1
    assert select_epoch(rows(im=[math.nan, -math.inf, 0.1]), "im") == 2
    assert select_epoch(rows(im=[math.nan]), "im") is None
    assert select_epoch([], "im") is None
    assert select_epoch([{"epoch": 0}], "im") is None
    assert select_epoch([{"select/im": 0.3}], "im") == 0  # a history without the guard


def test_a_collapsed_validation_is_refused_with_a_warning():
    history = rows(im=[0.1, 0.9, 0.3], collapsed=[0, 1, 0])
    with pytest.warns(UserWarning, match=r"epoch 1 has the best im.*refused"):
        assert select_epoch(history, "im") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no word about one that would not have been taken
        assert select_epoch(rows(im=[0.1, 0.2, 0.3], collapsed=[0, 1, 0]), "im") == 2
    with pytest.warns(UserWarning, match="none is selected"):
        assert select_epoch(rows(im=[0.1, 0.9], collapsed=[1, 1]), "im") is None


def test_the_oracle_has_no_part_in_the_choice():
    history = rows(im=[0.1, 0.7, 0.3])
    for row, accuracy in zip(history, (0.9, 0.1, 0.8), strict=True):
        row["oracle/target_accuracy"] = accuracy
    assert select_epoch(history, "im") == 1
    with pytest.raises(uda.UDAError, match="unknown label-free score 'oracle/target_accuracy'"):
        needed_scores("oracle/target_accuracy")


def test_vote_is_the_mean_rank():
    scores = {"a": [1.0, 2.0, 3.0], "b": [5.0, 5.0, 1.0], "c": [math.nan, 0.0, 0.5]}
    #         ranks 0, 1, 2;             1.5, 1.5, 0;             0, 1, 2
    assert vote(scores).tolist() == pytest.approx([1.5 / 6, 3.5 / 6, 4 / 6])
    monotone = {"a": [math.exp(v) for v in scores["a"]], "b": scores["b"], "c": scores["c"]}
    assert vote(monotone).tolist() == vote(scores).tolist()
    assert vote({"a": [0.3]}).tolist() == [0.0]
    with pytest.raises(uda.UDAError, match="as many values"):
        vote({"a": [1.0], "b": [1.0, 2.0]})


def test_selecting_by_several_scores():
    history = rows(im=[0.1, 0.9, 0.8], snd=[1.0, 2.0, 9.0], dev=[-0.5, -0.4, -0.1])
    assert select_epoch(history, ["im", "snd", "dev"]) == 2
    assert select_epoch(history, "vote") == 2
    assert select_epoch(history, ["im", "rankme"]) is None  # one that was never computed
    assert select_epoch(rows(entropy=[0.1, 0.2]), "vote") is None
    assert needed_scores("snd") == ["snd"]
    assert needed_scores(["im", "snd"]) == ["im", "snd"]
    assert "dev" in needed_scores("vote")
    assert "dev" not in needed_scores("vote", source=False)
    with pytest.raises(uda.UDAError, match=r"'imm'.*'im'"):
        needed_scores(["imm"])


def test_what_a_checkpoint_monitors():
    history = rows(im=[0.1, 0.9, 0.8], collapsed=[0, 1, 0])
    assert [monitor_value(history[: i + 1], "im") for i in range(3)] == [0.1, -math.inf, 0.8]
    assert running_choice(history, "im") == 2
    # the second wins when it comes, the third does not, the fourth does: the last winner's checkpoint is kept
    votes = rows(im=[1.0, 2.0, 1.5, 3.0], snd=[1.0, 2.0, 1.0, 4.0])
    assert [monitor_value(votes[: i + 1], ["im", "snd"]) for i in range(4)] == [1.0, 2.0, -math.inf, 4.0]
    assert running_choice(votes, ["im", "snd"]) == 3
    assert running_choice(rows(im=[math.nan]), "im") is None


def test_the_guard_sees_each_kind_of_collapse():
    y = torch.arange(100) % 10
    confident = 20 * torch.nn.functional.one_hot(y, 10).double()
    sound = collapse(confident)
    assert sound == (False, 1.0, pytest.approx(0.1), pytest.approx(10, rel=1e-3))
    one = 20 * torch.nn.functional.one_hot(torch.where(y < 9, 3, 4), 10).double()
    assert collapse(one).collapsed
    assert collapse(one).largest == pytest.approx(0.9)
    assert not collapse(one, CollapseGuard(min_used=0.2, max_share=0.95, min_rank=1)).collapsed
    two = 20 * torch.nn.functional.one_hot(y % 2, 10).double()
    assert collapse(two) == (False, 0.2, 0.5, pytest.approx(2, rel=1e-3))  # at the border, not below it
    assert collapse(two, CollapseGuard(min_used=0.3)).collapsed
    noise = 1e-4 * torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    flat = collapse(noise)  # ten classes in use, and no information
    assert flat.collapsed
    assert flat.used == 1.0
    assert flat.rank < 1.2


def test_few_samples_of_many_classes_are_no_collapse():
    assert not collapse(20 * torch.eye(100)[:8]).collapsed


def test_thresholds_are_checked():
    with pytest.raises(uda.UDAError, match="max_share is a share"):
        CollapseGuard(max_share=80)
