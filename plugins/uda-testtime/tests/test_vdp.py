"""VDP written out again: decorated inputs, the homeostatic penalty, the teacher, and the frozen net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from uda_testtime import Adapter, BNStatistics, Guard, Source
from uda_testtime.vdp import VDP, Prompts

from uda.errors import UDAError


def images() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ).eval()


def test_patches_lie_where_they_were_drawn():
    prompts = Prompts(True, 2, 3, torch.tensor([[0.0, 1.0], [0.5, 0.4]]))
    with torch.no_grad():
        prompts.specific.copy_(torch.randn(2, 3, 3))
        prompts.agnostic.copy_(torch.randn(2, 3, 3))
    for h, w in ((8, 9), (2, 5)):
        x = torch.randn(4, 2, h, w)
        wanted = x.numpy().copy()
        for prompt, (v, u) in ((prompts.specific, (0.0, 1.0)), (prompts.agnostic, (0.5, 0.4))):
            for i in range(min(3, h)):
                for j in range(min(3, w)):
                    row, column = round(v * max(h - 3, 0)) + i, round(u * max(w - 3, 0)) + j
                    wanted[:, :, row, column] += prompt[:, i, j].detach().numpy()
        assert np.allclose(prompts(x).detach(), wanted, atol=1e-6)


@pytest.mark.parametrize("views", [1, 3])
def test_vdp_is_its_formula(views, net, batches):
    a = Adapter(net(), VDP(
        lr=3.0, optimizer="sgd", momentum=0.7, views=views, homeostasis=0.05, damp=1e-6, threshold=0.02
    ))  # fmt: skip
    model, g = net(), torch.Generator().manual_seed(0)
    torch.rand(2, 2, generator=g)  # places of patches, which rows do not have
    prompt = [torch.zeros(4).double().requires_grad_() for _ in range(2)]  # specific, agnostic
    teacher, velocity = [torch.zeros(4).double()] * 2, [0, 0]
    importance, anchor, start, path = (torch.zeros(4).double() for _ in range(4))
    last, changes = None, 0

    def forward(x, prompts):
        return model(x + prompts[0] + prompts[1])  # running statistics

    for x in batches(8):
        z = forward(x, prompt)
        confidence = float(z.softmax(1).detach().max(1).values.mean())
        if last is not None and abs(confidence - last) > 0.02:
            changes += 1
            omega = prompt[1].detach().clone()
            importance = importance + path.clamp(min=0) / ((omega - start) ** 2 + 1e-6)
            anchor, start, path = omega, omega, torch.zeros(4).double()
        last = confidence
        seen = [x + 0.1 * x.std(1, correction=0, keepdim=True) * torch.randn(x.shape, generator=g).to(x)
                for _ in range(views)]  # fmt: skip
        q = (sum(forward(v, teacher) for v in seen) / views).softmax(1).detach()
        loss = -(q * z.log_softmax(1)).sum(1).mean()
        gradient = torch.autograd.grad(loss, prompt, retain_graph=True)
        whole = loss + 0.05 * (importance * (prompt[1] - anchor) ** 2).sum()
        old = prompt[1].detach().clone()
        for i, d in enumerate(torch.autograd.grad(whole, prompt)):
            velocity[i] = 0.9 * velocity[i] + d
            prompt[i].data -= 3 * velocity[i]
        path = path - gradient[1] * (prompt[1].detach() - old)
        teacher = [0.7 * t + 0.3 * p.detach() for t, p in zip(teacher, prompt, strict=True)]
        assert torch.allclose(a(x), z)
    assert 1 < changes < 7
    assert importance.max() > 0
    found = a.extra["prompts"]
    for mine, naive in ((found.specific, prompt[0]), (found.agnostic, prompt[1]), (found.importance, importance),
                        (found.anchor, anchor), (found.path, path)):  # fmt: skip
        assert torch.allclose(mine, naive)
    assert torch.allclose(a.extra["teacher"].copies[0].agnostic, teacher[1])
    assert not torch.allclose(prompt[0], prompt[1])  # the penalty holds one of them


def test_only_prompts_of_images_move_and_the_generator_places_them():
    x = torch.rand(3, 8, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    a, b = (Adapter(images(), VDP(lr=0.1, size=5, views=1), seed=s, guard=Guard(drift=0.1)) for s in (0, 1))
    before = [p.clone() for p in a.net.parameters()]
    for v in x:
        a(v), b(v)
    assert all(torch.equal(p, q) for p, q in zip(a.net.parameters(), before, strict=True))
    assert all(p.abs().min() > 0 for p in a.parameters)  # the gradient reaches each pixel of the patches
    assert not torch.equal(a.extra["prompts"].places, b.extra["prompts"].places)
    assert a.rollbacks == 0  # prompts start at zero: a guard has no drift to measure
    assert not torch.equal(a(x[0]), Adapter(images(), BNStatistics())(x[0]))


def test_without_effect_it_is_the_base_prediction(net, batches):
    for options in ({"lr": 0}, {"weight": 0}):
        for make, base, given in ((net, Source(), batches(3)), (images, BNStatistics(), torch.rand(3, 4, 3, 12, 12))):
            a, b = Adapter(make(), VDP(views=1, **options)), Adapter(make(), base)
            assert all(torch.equal(a(x), b(x)) for x in given)
    a, b = Adapter(net(), VDP(lr=1.0, source_weight=0.0)), Adapter(net(), BNStatistics())
    assert all(torch.allclose(a(x), b(x)) for x in batches())  # the batch's mean takes a shift of all samples away


def test_bad_input(net):
    with pytest.raises(UDAError, match=r"images \[B, 3, H, W\]"):
        Adapter(images(), VDP())(torch.rand(2, 1, 12, 12))
    with pytest.raises(UDAError, match="takes 4 inputs"):
        Adapter(nn.Sequential(nn.Flatten(), net()), VDP())(torch.rand(2, 1, 3, 3).double())
    assert Adapter(nn.Sequential(nn.Flatten(), net()), VDP())(torch.rand(2, 1, 2, 2).double()).shape == (2, 3)
    with pytest.raises(UDAError, match="no Linear or Conv2d"):
        Adapter(nn.Sequential(nn.BatchNorm1d(4)), VDP())
    with pytest.raises(UDAError, match="size=0"):
        VDP(size=0)
    with pytest.raises(UDAError, match="learns nothing"):
        VDP(views=0)
