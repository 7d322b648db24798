"""Channel attention by domain, and the decision which branches the domains share, against numpy and plain loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from uda_conditioned.attention import ChannelAttention, ConditionedLayer, decide, domain_gap, merge, moments

import uda
from uda.nn import domain_context


def numpy_attention(attention: ChannelAttention, x: np.ndarray, role: str) -> np.ndarray:
    """Attention of one sample ``[C, H, W]``, channel by channel."""
    first, second = getattr(attention.reduce, role), attention.expand
    w1, b1, w2, b2 = (p.detach().double().numpy() for p in (first.weight, first.bias, second.weight, second.bias))
    z = np.array([channel.mean() for channel in x])
    hidden = [max(0.0, sum(w1[j, c] * z[c] for c in range(len(z))) + b1[j]) for j in range(len(b1))]
    out = np.empty_like(x)
    for c in range(len(z)):
        logit = sum(w2[c, j] * hidden[j] for j in range(len(hidden))) + b2[c]
        out[c] = x[c] * 2 / (1 + math.exp(-logit))
    return out


@pytest.mark.parametrize("role", ["source", "target"])
def test_attention_by_domain(role, stir):
    attention = stir(ChannelAttention(6, 3))
    x = torch.randn(4, 6, 2, 3)
    with domain_context("any", role):
        got = attention(x)
    expected = [numpy_attention(attention, sample, role) for sample in x.double().numpy()]
    np.testing.assert_allclose(got.detach().numpy(), np.stack(expected), rtol=1e-4, atol=1e-5)
    with domain_context("any", role):  # each feature a channel
        rows = attention(x[:, :, 0, 0])
        torch.testing.assert_close(rows, attention(x[:, :, :1, :1])[:, :, 0, 0])


def test_domains_of_a_joint_forward_and_defaults(stir):
    layer = stir(ConditionedLayer(nn.Linear(4, 3)))
    x = torch.randn(5, 4)
    with domain_context("joint", "joint", [("a", "source", 2), ("t", "target", 3)]):
        got = layer(x)
    torch.testing.assert_close(got, torch.cat([layer.source(x[:2]), layer.target(x[2:])]))
    torch.testing.assert_close(layer(x), layer.target(x))  # what is deployed serves the target
    with domain_context("t", "held_out"):
        torch.testing.assert_close(layer(x), layer.target(x))
    with pytest.raises(uda.UDAError, match="separate"), domain_context("j", "joint", [("a", "source", 9)]):
        layer(x)
    with pytest.raises(uda.UDAError, match="1x1"):
        ConditionedLayer(nn.Conv2d(3, 3, 3))


def test_moments_merge_to_those_of_the_union():
    parts = [torch.randn(3, 4) + 100, torch.randn(7, 2, 1) - 5, torch.zeros(3)]
    rows = [moments(p) for p in parts[:2]]
    n, mean, variance = merge(torch.stack([*rows, torch.zeros(3)])).tolist()
    union = np.concatenate([p.double().numpy().ravel() for p in parts[:2]])
    assert (n, mean) == (26, pytest.approx(union.mean(), rel=1e-5))
    assert variance == pytest.approx(union.var(), rel=1e-4)
    assert merge(torch.zeros(2, 3)).tolist() == [0, 0, 0]


def test_gap_of_domains():
    for source, target in (((0.4, 0.1), (0.3, 0.2)), ((-0.4, 0.1), (-0.3, 0.2)), ((0.4, 0.1), (-0.2, 0.5))):
        r_s, r_t = (m / math.sqrt(v + 1e-5) for m, v in (source, target))
        got = domain_gap(torch.tensor(source), torch.tensor(target))
        assert float(got) == pytest.approx(math.tanh(abs(r_s - r_t) / abs(r_t)), rel=1e-5)
    same = torch.tensor([0.0, 0.1])
    assert float(domain_gap(same, same)) == 0


def test_a_shared_branch_is_the_sources(stir):
    layer = stir(ConditionedLayer(nn.Conv2d(4, 3, 1), gated=True))
    z = torch.randn(5, 4, 1, 1)
    torch.testing.assert_close(layer(z), layer.target(z))
    layer.shared.fill_(True)
    torch.testing.assert_close(layer(z), layer.source(z))
    grads = torch.autograd.grad(layer(z).sum(), list(layer.parameters()))  # none is missing, as processes need
    assert [bool(g.abs().sum() > 0) for g in grads] == [n.startswith("source") for n, _ in layer.named_parameters()]


def test_decisions_follow_running_statistics():
    near, far = (ConditionedLayer(nn.Linear(4, 2), gated=True) for _ in range(2))
    layers, seen = [near, far], torch.zeros(2, 2, 3)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(3):
        for layer, shift in ((near, 0.02), (far, 1.0)):
            z = torch.rand(2, 8, 4, generator=generator)
            for role, x in (("source", z[0]), ("target", z[1] + shift)):
                with domain_context("any", role):
                    layer(x)
        seen = torch.stack([layer.take_seen() for layer in layers])
        kept.append(seen[..., 1:].double().numpy())
        decide(layers, seen, 0.2, 0.9)
    running = kept[0]
    for new in kept[1:]:
        running = 0.9 * running + 0.1 * new
    for layer, expected in zip(layers, running, strict=True):
        np.testing.assert_allclose(layer.moments.numpy(), expected, rtol=1e-5)
        assert int(layer.steps) == 3
    assert bool(near.shared)
    assert not bool(far.shared)
    before = copy.deepcopy(near.state_dict())
    decide(layers, torch.zeros(2, 2, 3), 0.2, 0.9)  # a step without one of the domains decides nothing
    assert all(torch.equal(v, before[k]) for k, v in near.state_dict().items())
