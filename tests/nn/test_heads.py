from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from uda.errors import UDAError
from uda.nn import Bottleneck, CosineHead, DomainDiscriminator, WeightNormHead, make_head

KINDS = ["linear", "weight_norm", "cosine"]


@pytest.mark.parametrize("kind", KINDS)
def test_heads_shapes_prototypes_and_round_trips(kind):
    head = make_head(kind, 6, 4)
    x = torch.randn(5, 6)
    assert head(x).shape == (5, 4)
    assert head.weight_vectors.shape == (4, 6)
    head.weight_vectors.square().sum().backward()  # prototypes carry gradient
    assert any(p.grad is not None for p in head.parameters())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), make_head(kind, 6, 4)):
        other.load_state_dict(head.state_dict())
        assert torch.equal(other(x), head(x))


def test_linear_head_is_inner_product_plus_bias():
    head = make_head("linear", 3, 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(head(x), x @ head.weight_vectors.T + head.linear.bias)
    assert make_head("linear", 3, 2, bias=False).linear.bias is None


def test_weight_norm_head_splits_direction_and_length():
    torch.manual_seed(1)
    head = WeightNormHead(5, 3)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3), dim=0)
    with torch.no_grad():
        reference.parametrizations.weight.original0.copy_(head.length)
        reference.parametrizations.weight.original1.copy_(head.direction)
        reference.bias.copy_(head.bias)
        head.direction.mul_(7.0)  # the length of the direction does not count
    x = torch.randn(4, 5)
    torch.testing.assert_close(head(x), reference(x))
    torch.testing.assert_close(head.weight_vectors.norm(dim=1, keepdim=True), head.length)


def test_cosine_head_value_and_precision():
    head = CosineHead(8, 3, temperature=0.1)
    x = torch.randn(4, 8)
    w = head.weight
    expected = torch.stack(
        [torch.stack([torch.dot(f, c) / (f.norm() * c.norm()) / 0.1 for c in w]) for f in x]
    )
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.weight_vectors.norm(dim=1), torch.ones(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head(x).dtype == torch.float32
        torch.testing.assert_close(head(x), expected)
    assert CosineHead(8, 3).to("meta")(x.to("meta")).shape == (4, 3)  # a device without autocast
    with pytest.raises(UDAError, match="positive"):
        CosineHead(8, 3, temperature=0)


def test_unknown_kinds_are_refused():
    with pytest.raises(UDAError, match="'cosine'"):
        make_head("cosin", 3, 2)
    with pytest.raises(UDAError, match="'batch'"):
        Bottleneck(3, 2, norm="bach")


@pytest.mark.parametrize(
    ("norm", "layer"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm), ("none", nn.Identity)]
)
def test_bottleneck_layers(norm, layer):
    net = Bottleneck(6, 4, norm=norm, dropout=0.5)
    assert [type(m) for m in net.net] == [nn.Linear, layer, nn.ReLU, nn.Dropout]
    assert net(torch.randn(3, 6)).shape == (3, 4)
    assert net.out_features == 4
    plain = Bottleneck(6, 4, norm=norm, activation=False)
    assert [type(m) for m in plain.net] == [nn.Linear, layer]
    assert (plain(torch.randn(50, 6)) < 0).any()


def test_discriminator_layers():
    net = DomainDiscriminator(6, hidden=8, layers=2, out_features=3, dropout=0.1)
    assert sum(isinstance(m, nn.BatchNorm1d) for m in net.modules()) == 2
    assert sum(isinstance(m, nn.Dropout) for m in net.modules()) == 2
    assert net(torch.randn(5, 6)).shape == (5, 3)
    plain = DomainDiscriminator(6, layers=0, batch_norm=False)
    assert [tuple(p.shape) for p in plain.parameters()] == [(1, 6), (1,)]
