"""Meta-DMoE against its equations in numpy, with meta-gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from uda_testtime import Adapter, SourceSamples
from uda_testtime.meta_dmoe import Aggregator, MetaDMoE

from uda.errors import UDAError

SMALL = {"support": 8, "batch_size": 16, "heads": 3, "epochs": 1, "expert_epochs": 1, "aggregator_epochs": 1}


def normed(x, layer):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * layer.weight.detach().numpy() + layer.bias.detach().numpy()


def linear(x, weight, bias):
    return x @ weight.detach().numpy().T + bias.detach().numpy()


def test_the_aggregator_is_attention_over_experts():
    torch.manual_seed(0)
    heads, net, x = 2, Aggregator(4, 3, heads=2).double().eval(), np.random.default_rng(0).normal(size=(5, 3, 4))
    layer = net.layers[0]
    wanted = []
    for tokens in x:
        q, k, v = np.split(linear(normed(tokens, layer.norm1), layer.self_attn.in_proj_weight,
                                  layer.self_attn.in_proj_bias), 3, axis=1)  # fmt: skip
        parts = []
        for h in range(heads):
            cut = slice(2 * h, 2 * h + 2)
            score = np.exp(q[:, cut] @ k[:, cut].T / np.sqrt(2))
            parts.append(score / score.sum(1, keepdims=True) @ v[:, cut])
        out = layer.self_attn.out_proj
        tokens = tokens + linear(np.concatenate(parts, 1), out.weight, out.bias)
        hidden = torch.from_numpy(linear(normed(tokens, layer.norm2), layer.linear1.weight, layer.linear1.bias))
        gelu = (hidden * (1 + torch.erf(hidden / 2**0.5)) / 2).numpy()
        wanted.append((tokens + linear(gelu, layer.linear2.weight, layer.linear2.bias)).mean(0))
    assert np.allclose(net.features(torch.from_numpy(x)).detach().numpy(), wanted)


def parts_of(net):
    return [p.detach().numpy().copy() for p in net.parameters()]  # W, b, scale, shift, V, c


def features(theta, bn, x):
    w, b, scale, shift = theta[:4]
    hat = (x @ w.T + b - bn.running_mean.numpy()) / np.sqrt(bn.running_var.numpy() + bn.eps)
    return hat, np.maximum(hat * scale + shift, 0)


def adapted(theta, bn, x, teacher, lr):
    """The inner step with its gradient written out."""
    hat, h = features(theta, bn, x)
    g = 2 * (h - teacher) / h.size * (h > 0)
    inner = g * theta[2] / np.sqrt(bn.running_var.numpy() + bn.eps)
    grads = [inner.T @ x, inner.sum(0), (g * hat).sum(0), g.sum(0)]
    return [p - lr * d for p, d in zip(theta[:4], grads, strict=True)] + theta[4:]


def outer(theta, bn, x, y):
    z = features(theta, bn, x)[1] @ theta[4].T + theta[5]
    return float(np.mean([np.log(np.exp(z[i]).sum()) - z[i, y[i]] for i in range(len(y))]))


@pytest.mark.parametrize("order", ["second", "first"])
def test_the_meta_gradient_is_the_derivative(order, net, source):
    a = Adapter(net(), MetaDMoE(**SMALL, inner_lr=2.0, order=order))
    for k in range(2):  # experts that differ from the student
        with torch.no_grad():
            a.extra[f"expert{k}"][0].weight.add_(0.3 * (k + 1))
    agg, bn, x, y = a.extra["aggregator"], a.net[1].norm, source().x[:16], source().y[:16]
    a.train_parameters([*a.net.parameters(), *agg.layers.parameters()], "sgd", 0.1)
    loss = a.method.episode(a, x, y, 1)
    a.backward(loss)

    def teacher():
        f = a.features(x[:8], a.extra["expert0"])[0]  # domain 1: the other expert alone
        return agg.features(f[:, None]).detach().numpy()

    theta, (xs, xq), yq = parts_of(a.net), (x[:8].numpy(), x[8:].numpy()), y[8:].numpy()
    after = adapted(theta, bn, xs, teacher(), 2.0)
    assert loss.item() == pytest.approx(outer(after, bn, xq, yq))
    eps, found = 1e-6, list(a.net.parameters())
    for i, p in enumerate(theta):
        for place in list(np.ndindex(p.shape))[:3]:
            values = []
            for sign in (1, -1):
                moved = [q.copy() for q in (theta if order == "second" else after)]
                moved[i][place] += sign * eps
                moved = adapted(moved, bn, xs, teacher(), 2.0) if order == "second" else moved
                values.append(outer(moved, bn, xq, yq))
            assert float(found[i].grad[place]) == pytest.approx((values[0] - values[1]) / (2 * eps), abs=1e-6)
    weight = agg.layers[0].linear2.weight
    if order == "first":
        assert weight.grad is None or not weight.grad.any()
        return
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            weight[0, 0] += sign * eps
        values.append(outer(adapted(theta, bn, xs, teacher(), 2.0), bn, xq, yq))
    assert float(weight.grad[0, 0]) == pytest.approx((values[0] - values[1]) / (2 * eps), abs=1e-8, rel=1e-4)
    assert weight.grad[0, 0] != 0


def test_a_stream_is_adapted_to_once_on_its_first_samples(ready, batches):
    a = ready(MetaDMoE(**SMALL | {"support": 20, "batch_size": 24}, inner_lr=0.5))
    bn, start, seen = a.net[1].norm, parts_of(a.net), torch.empty(0, 4, dtype=torch.float64)
    for x in batches(4):
        seen = torch.cat([seen, x])[:20]
        teacher = a.extra["aggregator"].features(a.method.tokens(a, seen)).detach().numpy()
        theta = adapted(start, bn, seen.numpy(), teacher, 0.5)
        z = features(theta, bn, x.numpy())[1] @ theta[4].T + theta[5]
        assert np.allclose(a(x).numpy(), z)
    assert a.updates == 2  # of 16 samples, then of 20
    each = ready(MetaDMoE(**SMALL, inner_lr=0.5, adapt="each"))
    one, two = batches(2)
    first = each(one)
    each(two)
    assert torch.equal(each(one), first)


def test_all_that_is_meta_trained_moves(ready, net):
    kept = {}
    for order in ("second", "first"):
        a, b = ready(MetaDMoE(**SMALL, order=order, lr=0.01, aggregator_lr=0.01)), Adapter(net(), MetaDMoE(**SMALL))
        assert not torch.equal(a.net[3].weight, b.net[3].weight)
        assert not torch.equal(a.net[0].weight, b.net[0].weight)
        assert not torch.equal(a.extra["expert0"][0].weight, a.extra["expert1"][0].weight)
        kept[order] = a.extra["aggregator"].layers[0].linear1.weight
    plain = ready(MetaDMoE(**SMALL | {"epochs": 0})).extra["aggregator"].layers[0].linear1.weight
    assert torch.equal(kept["first"], plain)
    assert not torch.equal(kept["second"], plain)


def test_episodes_are_of_one_domain(source):
    parts = list(source().domain_batches(10, torch.Generator().manual_seed(2)))
    assert [len(p["x"]) for p in parts] == [10] * 4
    assert {int(p["domain"][0]) for p in parts} == {0, 1}
    for p in parts:
        assert len(p["domain"].unique()) == 1
        assert len(p["x"].unique(dim=0)) == 10


@pytest.mark.parametrize(
    ("given", "told"),
    [({"experts": 1}, "2 or more"), ({"support": 96}, "support"), ({"order": "third"}, "order"),
     ({"adapt": "never"}, "adapt")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(given, told):
    with pytest.raises(UDAError, match=told):
        MetaDMoE(**given)


def test_data_that_cannot_serve_are_refused(net, source):
    with pytest.raises(UDAError, match="does not divide"):
        Adapter(net(), MetaDMoE())
    for given, told in (({"experts": 3}, "3 experts"), ({"support": 24, "batch_size": 48}, "source_samples")):
        with pytest.raises(UDAError, match=told):
            Adapter(net(), MetaDMoE(**SMALL | given)).prepare(source())
    with pytest.raises(UDAError, match="several source domains"):
        Adapter(net(), MetaDMoE(**SMALL)).prepare(SourceSamples(source().x, source().y))
