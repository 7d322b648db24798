from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from uda.errors import UDAError
from uda.nn import EMATeacher, make_head


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


@pytest.mark.parametrize("buffers", ["copy", "average", "none"])
def test_update_follows_the_formula(buffers):
    torch.manual_seed(0)
    student = _net()
    teacher = EMATeacher(student, buffers=buffers)
    start = copy.deepcopy(student.state_dict())
    with torch.no_grad():
        for p in student.parameters():
            p.add_(torch.randn_like(p))
    student(torch.randn(8, 3))
    teacher.update(student, 0.9)
    now = student.state_dict()
    for name, value in teacher.copies[0].state_dict().items():
        is_buffer = "running" in name or "num_batches" in name
        mode = buffers if is_buffer else "average"
        if "num_batches" in name and mode == "average":
            mode = "copy"
        expected = {"copy": now[name], "none": start[name]}.get(mode)
        if mode == "average":
            expected = 0.9 * start[name] + 0.1 * now[name]
        torch.testing.assert_close(value, expected)


def test_extremes_of_the_momentum():
    student = nn.Linear(2, 2)
    teacher = EMATeacher(student)
    before = teacher.copies[0].weight.clone()
    nn.init.normal_(student.weight)
    teacher.update(student, 1.0)
    assert torch.equal(teacher.copies[0].weight, before)
    teacher.update(student, 0.0)
    torch.testing.assert_close(teacher.copies[0].weight, student.weight.detach())
    with pytest.raises(UDAError, match=r"\[0, 1\]"):
        teacher.update(student, 1.1)


def test_never_trains_and_shares_nothing():
    student = _net()
    around = nn.ModuleDict({"student": student, "teacher": EMATeacher(student)})
    around.train()
    assert student.training
    assert not any(m.training for m in around["teacher"].modules())
    assert not any(p.requires_grad for p in around["teacher"].parameters())
    mine = {p.data_ptr() for p in around["teacher"].parameters()}
    assert not mine & {p.data_ptr() for p in student.parameters()}
    x = torch.randn(4, 3)
    assert torch.equal(around["teacher"](x), around["teacher"](x))  # no dropout


def test_chain_of_modules_and_round_trips():
    parts = [_net(), make_head("weight_norm", 4, 2)]
    teacher = EMATeacher(parts)
    x = torch.randn(4, 3)
    for p in parts:
        p.eval()
    torch.testing.assert_close(teacher(x), parts[1](parts[0](x)))
    other = EMATeacher([_net(), make_head("weight_norm", 4, 2)])
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other(x), teacher(x))
    clone = copy.deepcopy(teacher)
    assert torch.equal(clone(x), teacher(x))
    assert not clone.training


def test_another_structure_is_refused():
    teacher = EMATeacher([_net(), nn.Linear(4, 2)])
    with pytest.raises(UDAError, match="differ"):
        teacher.update(_net(), 0.9)
    with pytest.raises(UDAError, match="differ"):
        teacher.update([nn.Linear(4, 2), _net()], 0.9)
    with pytest.raises(UDAError, match="'average'"):
        EMATeacher(_net(), buffers="mean")
