from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

from uda.described import describe
from uda.errors import UDAError
from uda.optim import (
    Constant,
    Cosine,
    InverseDecay,
    Restarts,
    build_optimizer,
    build_scheduler,
    default_optimizer,
    no_decay,
)


def test_inverse_decay_is_the_papers():
    schedule = InverseDecay()
    assert [schedule.factor(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1, 6**-0.75, 11**-0.75])
    # a rule by iteration: 1e-3 a step over 20,000 steps
    by_step = InverseDecay(gamma=1e-3 * 20_000)
    assert by_step.factor(5_000 / 20_000) == pytest.approx((1 + 1e-3 * 5_000) ** -0.75)


def test_cosine_and_constant_with_warm_up():
    assert [Constant(warmup=0.2).factor(p) for p in (0, 0.1, 0.2, 1)] == pytest.approx([0, 0.5, 1, 1])
    schedule = Cosine(warmup=0.2, final=0.1)
    assert [schedule.factor(p) for p in (0, 0.1, 0.2, 0.6, 1)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    assert InverseDecay(warmup=0.5).factor(0.25) == pytest.approx(0.5 * 3.5**-0.75)


def test_restarts_repeat_a_schedule():
    """Five steps of each of seven parts have the factors of a run of five steps, borders included."""
    schedule = Restarts(InverseDecay(warmup=0.1), 7)
    alone = [InverseDecay(warmup=0.1).factor(i / 5) for i in range(5)]
    assert [schedule.factor(i / 35) for i in range(35)] == pytest.approx(alone * 7, abs=1e-6)
    assert schedule.factor(1.0) == pytest.approx(11**-0.75)
    with pytest.raises(UDAError, match="number of equal parts"):
        Restarts(Constant(), 0)


@pytest.mark.parametrize("warmup", [-0.1, 1.0, 100])
def test_a_warm_up_is_a_share(warmup):
    with pytest.raises(UDAError, match="share of the training"):
        Cosine(warmup=warmup)


def test_schedules_describe_themselves():
    assert describe(InverseDecay(gamma=3.0)) == {
        "class_path": "uda.optim.InverseDecay", "init_args": {"gamma": 3.0},
    }  # fmt: skip


def _groups():
    backbone, head = nn.Linear(3, 2), nn.Linear(2, 2)
    return backbone, head, [
        {"params": backbone.parameters(), "name": "backbone", "lr_scale": 0.1},
        {"params": list(head.parameters()), "name": "head", "weight_decay": 0.5},
    ]  # fmt: skip


def test_groups_run_at_their_scale():
    _, _, groups = _groups()
    optimizer = build_optimizer(default_optimizer, groups)
    told = [(g["name"], g["lr"], g["initial_lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert told == [("backbone", pytest.approx(1e-3), pytest.approx(1e-3), 1e-3), ("head", 0.01, 0.01, 0.5)]
    assert all(g["momentum"] == 0.9 and g["nesterov"] for g in optimizer.param_groups)


def test_frozen_parameters_and_empty_groups_are_dropped():
    backbone, head, groups = _groups()
    backbone.requires_grad_(False)
    head.bias.requires_grad_(False)
    optimizer = build_optimizer(torch.optim.Adam, [*groups, {"params": []}])
    assert [g["name"] for g in optimizer.param_groups] == ["head"]
    assert optimizer.param_groups[0]["params"] == [head.weight]
    head.requires_grad_(False)
    with pytest.raises(UDAError, match="nothing to train"):
        build_optimizer(torch.optim.Adam, [{"params": head.parameters()}])


def test_a_parameter_claimed_twice_names_both_owners():
    backbone, _, groups = _groups()
    with pytest.raises(UDAError, match="by 'backbone' and by 'align'"):
        build_optimizer(default_optimizer, [*groups, {"params": backbone.weight, "name": "align"}])


def test_group_names_are_distinct():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    groups = [{"params": a, "name": "x"}, {"params": b, "name": "x"}, {"params": c}]
    assert [g["name"] for g in build_optimizer(default_optimizer, groups).param_groups] == [
        "x",
        "x_2",
        "group2",
    ]


def test_what_returns_no_optimiser_is_refused():
    _, _, groups = _groups()
    with pytest.raises(UDAError, match="not list"):
        build_optimizer(list, groups)


def _run(steps, state=None, total=10):
    torch.manual_seed(0)
    _, _, groups = _groups()
    optimizer = build_optimizer(default_optimizer, groups)
    scheduler = build_scheduler(optimizer, InverseDecay(), total)
    if state is not None:
        optimizer.load_state_dict(state[0])
        scheduler.load_state_dict(state[1])
    seen = []
    for _ in range(steps):
        seen.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return seen, (optimizer.state_dict(), scheduler.state_dict())


def test_scheduler_follows_progress_and_resumes():
    whole, _ = _run(12)
    for i, (backbone, head) in enumerate(whole):
        factor = (1 + 10 * min(i / 10, 1)) ** -0.75
        assert (backbone, head) == (pytest.approx(1e-3 * factor), pytest.approx(1e-2 * factor))
    first, state = _run(5)
    file = io.BytesIO()
    torch.save(state, file)  # names and numbers only
    file.seek(0)
    rest, _ = _run(7, torch.load(file, weights_only=True))
    torch.testing.assert_close(torch.tensor(first + rest), torch.tensor(whole))


@pytest.mark.parametrize("steps", [0, -1, math.inf])
def test_scheduler_needs_a_length(steps):
    _, _, groups = _groups()
    with pytest.raises(UDAError, match="known number of steps"):
        build_scheduler(build_optimizer(default_optimizer, groups), Constant(), steps)


def test_no_decay_splits_weights_from_biases_and_norms():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(default_optimizer, no_decay(net, name="net", lr_scale=0.5))
    weights, rest = optimizer.param_groups
    assert (weights["name"], weights["weight_decay"], weights["lr"]) == ("net", 1e-3, 0.005)
    assert (rest["name"], rest["weight_decay"], rest["lr"]) == ("net_no_decay", 0.0, 0.005)
    assert [tuple(p.shape) for p in weights["params"]] == [(4, 3), (2, 4)]
    assert len(weights["params"]) + len(rest["params"]) == len(list(net.parameters()))
