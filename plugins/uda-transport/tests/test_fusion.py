"""Model fusion: the recursion derived again, exact recovery of permuted copies, and what is refused."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from uda_transport.batchnorm import recalibrate
from uda_transport.chain import chain_of
from uda_transport.fusion import fuse_modules

import uda
from uda.nn import MLP, Bottleneck, DomainBatchNorm, SmallCNN, make_head


class Functional(nn.Module):
    """A CNN whose activations, pooling and flattening are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first = nn.Conv2d(5, 7, 3, bias=False), nn.Conv2d(2, 5, 3)
        self.norm, self.out = nn.BatchNorm2d(7), nn.Linear(7 * 4, 3)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = F.max_pool2d(F.leaky_relu(self.norm(self.second(x))), 2)
        return self.out(x.view(x.size(0), -1))


class Pooled(nn.Module):
    """BatchNorm behind the activation and before it, LayerNorm, a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.BatchNorm2d(2)
        self.conv = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.BatchNorm2d(6))
        self.flat = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.flat(self.conv(self.start(x)).mean((2, 3)))


def small_cnn(head="linear"):
    return nn.Sequential(SmallCNN(2, (6, 8)), Bottleneck(8 * 4, 9), make_head(head, 9, 3))


def mlp(widths=(7, 5), bias=True):
    parts = [nn.Flatten()]
    for a, b in itertools.pairwise((2 * 8 * 8, *widths)):
        parts += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 3, bias=bias))


NETS = {
    "functional": Functional, "pooled": Pooled, "small_cnn": small_cnn, "mlp": mlp,
    "weight_norm": lambda: small_cnn("weight_norm"), "cosine": lambda: small_cnn("cosine"),
    "mlp_batchnorm": lambda: nn.Sequential(MLP((7, 6), in_features=128), nn.Linear(6, 3)),
}  # fmt: skip


def trained(make, seed):
    """A net with weights, gains and statistics that differ everywhere."""
    torch.manual_seed(seed)
    net = make()
    for name, value in net.state_dict().items():
        if "running_var" in name:
            value.uniform_(0.5, 2)
        elif value.dtype.is_floating_point and value.ndim == 1:
            value.normal_(1.0 if "weight" in name else 0.0, 0.5)
    return net.eval()


def inputs(n=6, seed=9):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def permuted(net):
    """The same function with the neurons of every hidden layer in another order."""
    net, order = copy.deepcopy(net), None
    chain = chain_of(net)
    ends = max(i for i, layer in enumerate(chain) if layer.kind != "norm")
    with torch.no_grad():
        for i, layer in enumerate(chain):
            module = net.get_submodule(layer.name)
            if layer.kind == "norm":
                _reorder(module, order)
                continue
            weight = getattr(module, "direction", module.weight if hasattr(module, "weight") else None)
            if order is not None:
                parts = weight.reshape(len(weight), len(order), -1, *weight.shape[2:])
                weight.copy_(parts[:, order].reshape(weight.shape))
            if i < ends:
                order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(i))
                weight.copy_(weight[order].clone())
                if module.bias is not None:
                    module.bias.copy_(module.bias[order].clone())
                if layer.norm:
                    _reorder(net.get_submodule(layer.norm), order)
    return net


def _reorder(norm, order):
    if order is not None:
        for value in [*norm.parameters(), *norm.buffers()]:
            if value.ndim:
                value.copy_(value[order].clone())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("metric", ["weights", "activations"])
def test_a_permuted_copy_is_recovered(name, metric):
    net, x = trained(NETS[name], 0), inputs(32)
    other = permuted(net)
    assert torch.allclose(other(x), net(x), atol=1e-4)  # it is the same function ...
    assert any(not torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    fused = fuse_modules([net, other, permuted(other)], metric=metric, samples=x)
    torch.testing.assert_close(fused(x), net(x), atol=2e-5, rtol=1e-4)
    plain = fuse_modules([net, other], align=False)
    assert (plain(x) - net(x)).abs().max() > 0.02  # ... that plain averaging loses


@pytest.mark.parametrize("name", ["functional", "small_cnn", "pooled"])
def test_a_net_fused_with_itself_keeps_weights_and_statistics(name):
    net = trained(NETS[name], 1)
    for module in net.modules():  # a negative gain comes back as a negative row
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            module.weight.data.abs_()
    for key, value in fuse_modules([net, net], weights=[0.3, 0.7]).state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[key], atol=1e-5, rtol=1e-5, msg=key)


def best_assignment(cost):
    """Cheapest one-to-one map by trying all: ``order[j]`` is the neuron that stands at place j."""
    n = len(cost)
    return min(itertools.permutations(range(n)), key=lambda p: sum(cost[p[j], j] for j in range(n)))


@pytest.mark.parametrize("squared", [False, True])
def test_recursion_against_all_permutations(squared):
    """Two hidden layers, by hand: align inputs, find the assignment, align outputs, average."""
    nets = [trained(lambda: mlp((5, 4)), seed) for seed in (2, 3)]
    values = [[p.detach().double().numpy() for p in net.parameters()] for net in nets]
    (a1, c1, a2, c2, a3, c3), (b1, d1, b2, d2, b3, d3) = values

    def cost(w, b, w_ref, b_ref):
        out = np.zeros((len(w), len(w_ref)))
        for i, j in itertools.product(range(len(w)), range(len(w_ref))):
            out[i, j] = np.sum((w[i] - w_ref[j]) ** 2) + (b[i] - b_ref[j]) ** 2
        return out if squared else np.sqrt(out)

    p1 = list(best_assignment(cost(b1, d1, a1, c1)))
    b2 = b2[:, p1]
    p2 = list(best_assignment(cost(b2, d2, a2, c2)))
    s = 0.3
    expected = [
        s * a1 + (1 - s) * b1[p1], s * c1 + (1 - s) * d1[p1], s * a2 + (1 - s) * b2[p2], s * c2 + (1 - s) * d2[p2],
        s * a3 + (1 - s) * b3[:, p2], s * c3 + (1 - s) * d3,
    ]  # fmt: skip
    fused = fuse_modules(nets, weights=[s, 1 - s], squared=squared)
    for mine, theirs in zip(fused.parameters(), expected, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("align", [False, True])
def test_batchnorm_in_evaluation_is_the_average_of_folded_weights(align):
    nets = [nn.Sequential(nn.Conv2d(2, 4, 3, bias=bias), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
            for bias in (True, True)]  # fmt: skip
    nets = [trained(lambda n=n: n, seed) for seed, n in enumerate(nets)]
    nets[1][1].weight.data[0] *= -1
    x = inputs()
    order = list(range(4))
    folds = []
    for net in nets:
        scale = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach()
        bias = (net[1].bias + scale * (net[0].bias - net[1].running_mean)).detach()
        folds.append((net[0].weight.detach() * scale[:, None, None, None], bias))
    if align:
        rows = [torch.cat([w.flatten(1), b[:, None]], 1).double() for w, b in folds]
        order = list(best_assignment(torch.cdist(rows[1], rows[0]).numpy()))
    weight = (folds[0][0] + folds[1][0][order]) / 2
    bias = (folds[0][1] + folds[1][1][order]) / 2
    last = nets[1][3].weight.detach().reshape(3, 4, 36)[:, order].flatten(1)
    hidden = F.conv2d(x, weight, bias).flatten(1)
    expected = hidden @ ((nets[0][3].weight + last) / 2).T + (nets[0][3].bias + nets[1][3].bias) / 2
    torch.testing.assert_close(fuse_modules(nets, align=align)(x), expected, atol=1e-4, rtol=1e-4)


def test_activation_distances_are_those_of_the_activations():
    from uda_transport.neurons import activation_costs

    nets, x = [trained(small_cnn, s) for s in (0, 1)], inputs(70)
    chains = [chain_of(n) for n in nets]
    costs = activation_costs(nets, chains, x, squared=False, normalise=False)
    seen = [n[0].net[1](n[0].net[0](x)).transpose(0, 1).flatten(1).double() for n in nets]
    torch.testing.assert_close(costs[1][0], torch.cdist(seen[1], seen[0]), atol=1e-6, rtol=1e-6)
    assert len(costs[1]) == 4
    assert costs[0][0].diagonal().abs().max() < 1e-4


def test_recalibrated_statistics_are_those_of_the_samples():
    net, x = trained(small_cnn, 4), inputs(64)
    momentum = net[0].net[1].momentum
    recalibrate(net, x)
    hidden = net[0].net[0](x)
    torch.testing.assert_close(net[0].net[1].running_mean, hidden.mean((0, 2, 3)))
    torch.testing.assert_close(net[0].net[1].running_var, hidden.var((0, 2, 3)), rtol=1e-3, atol=1e-5)
    assert net[0].net[1].momentum == momentum
    assert not net.training


def test_a_wider_net_keeps_its_function_where_its_neurons_are_added_up():
    """Each neuron twice, with half the outgoing weights: adding up the incoming weights gives the narrow net back."""
    net, x = trained(lambda: mlp((4, 3)), 5), inputs()
    wide = mlp((8, 6))
    one, two, three, *_ = (m for m in wide if isinstance(m, nn.Linear))
    a, b, c = (m for m in net if isinstance(m, nn.Linear))
    with torch.no_grad():
        one.weight.copy_(a.weight.repeat(2, 1)), one.bias.copy_(a.bias.repeat(2))
        two.weight.copy_(b.weight.repeat(2, 2) / 2), two.bias.copy_(b.bias.repeat(2))
        three.weight.copy_(c.weight.repeat(1, 2) / 2), three.bias.copy_(c.bias)
    assert torch.allclose(wide(x), net(x), atol=1e-4)
    torch.testing.assert_close(fuse_modules([net, wide], incoming="mass")(x), net(x), atol=1e-4, rtol=1e-4)
    assert fuse_modules([wide, net], incoming="mass")[1].weight.shape == (8, 128)
    assert (fuse_modules([net, wide])(x) - net(x)).abs().max() > 1e-2  # the published formula averages them


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.block(x).relu()


class Depending(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor, self.linear = nn.Parameter(torch.ones(1)), nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) * self.factor


shared = nn.Linear(8, 8)


@pytest.mark.parametrize(("net", "told"), [
    (Residual(), ["add", "branches", "residual"]),
    (nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2)), ["MultiheadAttention|followed"]),
    (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), ["4 groups", "'0' (Conv2d)"]),
    (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), ["ConvTranspose2d"]),
    (nn.Sequential(nn.Conv2d(4, 4, 3), DomainBatchNorm(nn.BatchNorm2d(4))), ["DomainBatchNorm"]),
    (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)), ["running statistics"]),
    (nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), ["Softmax"]),
    (nn.Sequential(shared, nn.ReLU(), shared), ["used twice"]),
    (nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.Linear(4, 2)), ["Unflatten"]),
    (Scaled(), ["factor|joins"]),
    (Depending(), ["followed"]),
    (nn.Sequential(nn.ReLU()), ["no layer of weights"]),
])  # fmt: skip
def test_what_is_no_plain_chain_is_refused_by_name(net, told):
    with pytest.raises(uda.UDAError) as error:
        chain_of(net)
    for word in ("cannot be fused", *told):
        assert any(w in str(error.value) for w in word.split("|")), str(error.value)


def test_library_networks():
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):  # structure is all that counts
        vgg, resnet, vit = (getattr(torchvision.models, n)() for n in ("vgg11_bn", "resnet18", "vit_b_32"))
    assert [layer.kind for layer in chain_of(vgg)] == ["conv"] * 8 + ["linear"] * 3
    with pytest.raises(uda.UDAError, match=r"'layer1\.0'"):
        chain_of(resnet)
    with pytest.raises(uda.UDAError, match="cannot be fused"):
        chain_of(vit)


@pytest.mark.parametrize(("nets", "options", "told"), [
    ([mlp()], {}, "two networks"),
    ([mlp(), mlp()], {"weights": [0.5, 0.6]}, "sum 1"),
    ([mlp(), mlp()], {"weights": [1.0]}, "2 weights"),
    ([mlp(), mlp((7, 5, 4))], {}, "layers"),
    ([mlp(), mlp(bias=False)], {}, "bias"),
    ([mlp(), mlp((6, 5))], {"align": False}, "6 outputs"),
    ([mlp(), mlp()], {"metric": "activations"}, "samples"),
    ([mlp(), mlp()], {"batchnorm": "recalibrate"}, "samples"),
    ([mlp(), mlp()], {"metric": "weight"}, "'weights'"),
    ([small_cnn(), small_cnn("cosine")], {}, "CosineHead|LinearHead|Linear"),
])  # fmt: skip
def test_what_does_not_fit_together_is_told(nets, options, told):
    with pytest.raises(uda.UDAError, match=told):
        fuse_modules(nets, **options)
