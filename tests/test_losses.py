"""Each loss against an independent derivation in plain float64 loops."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from uda import losses
from uda.errors import UDAError

B, C, F = 7, 5, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def soft() -> torch.Tensor:
    return torch.rand(B, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)


def _softmax(z: np.ndarray) -> np.ndarray:
    out = np.zeros_like(z)
    for i, row in enumerate(z):
        e = [math.exp(v - max(row)) for v in row]
        out[i] = [v / sum(e) for v in e]
    return out


def _entropies(p: np.ndarray) -> list[float]:
    return [-sum(v * math.log(v) for v in row) for row in p]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_classification_loss(logits, soft, smoothing, weighted):
    y = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    weight = torch.linspace(0, 1, B, dtype=torch.float64) if weighted else None
    p = _softmax(logits.numpy())

    def expected(targets):
        rows = []
        for i in range(B):
            smooth = [(1 - smoothing) * t + smoothing / C for t in targets[i]]
            row = -sum(t * math.log(v) for t, v in zip(smooth, p[i], strict=True))
            rows.append(row * (float(weight[i]) if weighted else 1))
        return rows

    rows = expected(np.eye(C)[y])
    assert losses.classification_loss(logits, y, smoothing, weight).item() == pytest.approx(sum(rows) / B)
    none = losses.classification_loss(logits, y, smoothing, weight, reduction="none")
    assert none.tolist() == pytest.approx(rows)
    rows = expected(soft.tolist())
    assert losses.classification_loss(logits, soft, smoothing, weight).item() == pytest.approx(sum(rows) / B)
    value = losses.soft_cross_entropy(logits, soft, weight, smoothing)
    assert value.item() == pytest.approx(sum(rows) / B)


def test_classification_loss_refuses_what_does_not_fit(logits, soft):
    with pytest.raises(UDAError, match=r"Soft labels have shape \(7, 4\)"):
        losses.classification_loss(logits, soft[:, :4])
    with pytest.raises(UDAError, match="One weight a sample"):
        losses.classification_loss(logits, soft, weight=torch.ones(3))
    with pytest.raises(UDAError, match=r"distributions \[B, C\]"):
        losses.soft_cross_entropy(logits, torch.zeros(B))


def test_entropy(logits):
    expected = _entropies(_softmax(logits.numpy()))
    assert losses.entropy(logits).tolist() == pytest.approx(expected)
    assert losses.mean_entropy(logits).item() == pytest.approx(sum(expected) / B)


def test_entropy_is_finite_at_extremes():
    z = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], requires_grad=True)
    value = losses.entropy(z)
    assert value.tolist() == pytest.approx([0, math.log(3)])
    value.sum().backward()
    assert z.grad.isfinite().all()


def test_information_maximisation(logits):
    p = _softmax(logits.numpy())
    mean = [sum(p[i][c] for i in range(B)) / B for c in range(C)]
    expected = -sum(v * math.log(v) for v in mean) - sum(_entropies(p)) / B
    assert losses.information_maximisation(logits).item() == pytest.approx(expected)
    # certain and balanced is the best there is
    best = losses.information_maximisation(torch.eye(C) * 100)
    assert best.item() == pytest.approx(math.log(C), abs=1e-5)
    assert losses.information_maximisation(torch.zeros(B, C)).item() == pytest.approx(0, abs=1e-6)


def test_domain_adversarial_loss():
    s, t = torch.tensor([[0.3], [-1.2], [2.0]]), torch.tensor([0.7, -0.4])
    ws, wt = torch.tensor([0.2, 1.0, 0.5]), torch.tensor([[3.0], [1.0]])

    def sigmoid(v):
        return 1 / (1 + math.exp(-v))

    source = [-math.log(sigmoid(v)) for v in s.flatten().tolist()]
    target = [-math.log(1 - sigmoid(v)) for v in t.tolist()]
    plain = (sum(source) / 3 + sum(target) / 2) / 2
    assert losses.domain_adversarial_loss(s, t).item() == pytest.approx(plain)
    left = sum(w * v for w, v in zip(ws.tolist(), source, strict=True)) / 1.7
    right = (3 * target[0] + target[1]) / 4
    assert losses.domain_adversarial_loss(s, t, ws, wt).item() == pytest.approx((left + right) / 2)
    over_batch = (left * 1.7 / 3 + right * 4 / 2) / 2
    assert losses.domain_adversarial_loss(s, t, ws, wt, "batch").item() == pytest.approx(over_batch)
    assert losses.domain_adversarial_loss(s, t, torch.zeros(3), torch.zeros(2)).item() == 0
    huge = losses.domain_adversarial_loss(torch.full((2,), -1e4), torch.full((2,), 1e4))
    assert huge.item() == pytest.approx(1e4)
    with pytest.raises(UDAError, match="one number a sample"):
        losses.domain_adversarial_loss(torch.zeros(3, 2), t)
    with pytest.raises(UDAError, match="One weight a sample"):
        losses.domain_adversarial_loss(s, t, torch.ones(2))
    with pytest.raises(UDAError, match="Unknown mean"):
        losses.domain_adversarial_loss(s, t, mean="sum")


def test_entropy_weights(logits):
    raw = [1 + math.exp(-h) for h in _entropies(_softmax(logits.numpy()))]
    assert losses.entropy_weights(logits, normalise="none").tolist() == pytest.approx(raw)
    scaled = losses.entropy_weights(logits)
    assert scaled.tolist() == pytest.approx([w / (sum(raw) / B) for w in raw])
    z = logits.clone().requires_grad_()
    assert not losses.entropy_weights(z).requires_grad
    losses.entropy_weights(z, detach=False).sum().backward()
    assert z.grad.abs().sum() > 0  # with the normaliser a constant the sum is not
    with pytest.raises(UDAError, match="'domain'"):
        losses.entropy_weights(logits, normalise="batch")


def test_outer_product(soft):
    f = torch.randn(B, F, dtype=torch.float64)
    out = losses.outer_product(f, soft)
    expected = [[float(soft[b, c] * f[b, k]) for c in range(C) for k in range(F)] for b in range(B)]
    np.testing.assert_allclose(out.numpy(), expected)


def test_randomised_map(soft):
    f = torch.randn(B, F)
    layer = losses.RandomisedMap(F, C, out_features=6, seed=3)
    rf, rg = layer.features_map.double().numpy(), layer.probs_map.double().numpy()
    expected = np.zeros((B, 6))
    for b in range(B):
        for d in range(6):
            left = sum(float(f[b, k]) * rf[k, d] for k in range(F))
            right = sum(float(soft[b, c]) * rg[c, d] for c in range(C))
            expected[b, d] = left * right / math.sqrt(6)
    np.testing.assert_allclose(layer(f, soft.float()).numpy(), expected, atol=1e-5)
    assert list(layer.state_dict()) == ["features_map", "probs_map"]
    same, other = losses.RandomisedMap(F, C, 6, seed=3), losses.RandomisedMap(F, C, 6, seed=4)
    assert torch.equal(same.features_map, layer.features_map)
    assert not torch.equal(other.features_map, layer.features_map)
    assert torch.equal(copy.deepcopy(layer)(f, soft.float()), layer(f, soft.float()))


def test_randomised_map_keeps_inner_products_in_expectation(soft):
    f = torch.randn(B, F, generator=torch.Generator().manual_seed(2))
    exact = losses.outer_product(f, soft.float())
    random = losses.RandomisedMap(F, C, out_features=60_000)(f, soft.float())
    torch.testing.assert_close(random @ random.T, exact @ exact.T, atol=0.05, rtol=0.05)


def _confusion(z: np.ndarray, temperature: float) -> float:
    p = _softmax(z / temperature)
    raw = [1 + math.exp(-h) for h in _entropies(p)]
    w = [len(z) * v / sum(raw) for v in raw]
    c = z.shape[1]
    m = [[sum(w[i] * p[i][a] * p[i][b] for i in range(len(z))) for b in range(c)] for a in range(c)]
    m = [[v / sum(row) for v in row] for row in m]
    return sum(m[a][b] for a in range(c) for b in range(c) if a != b) / c


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_minimum_class_confusion(logits, temperature):
    value = losses.minimum_class_confusion(logits, temperature)
    assert value.item() == pytest.approx(_confusion(logits.numpy(), temperature))


def test_minimum_class_confusion_treats_weights_as_constants(logits):
    z = logits.clone().requires_grad_()
    losses.minimum_class_confusion(z).backward()
    # numerical derivative with the weights held fixed
    w = losses.entropy_weights(logits / 2.5)

    def fixed(v):
        p = (v / 2.5).softmax(1)
        m = p.T @ (w[:, None] * p)
        return 1 - (m / m.sum(1, keepdim=True)).trace() / C

    step = torch.zeros_like(logits)
    step[3, 1] = 1e-5
    slope = (fixed(logits + step) - fixed(logits - step)) / 2e-5
    assert z.grad[3, 1].item() == pytest.approx(slope.item(), rel=1e-6)


def test_minimum_class_confusion_with_a_class_nobody_predicts():
    z = torch.tensor([[9.0, 1.0, -1e4], [1.0, 9.0, -1e4]], requires_grad=True)
    value = losses.minimum_class_confusion(z)
    assert 0 < value.item() < 1
    value.backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    "name", ["entropy", "information_maximisation", "minimum_class_confusion", "entropy_weights"]
)
def test_half_precision_is_computed_in_full(name, logits):
    half = logits.bfloat16()
    expected = getattr(losses, name)(half.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = getattr(losses, name)(half)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)


def test_adversarial_and_classification_losses_under_autocast(logits, soft):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = losses.domain_adversarial_loss(logits[:, 0].bfloat16(), logits[:, 1].bfloat16())
        classification = losses.classification_loss(logits.bfloat16(), soft.float())
    assert adversarial.dtype == classification.dtype == torch.float32
    full = logits.bfloat16().float()
    assert torch.equal(adversarial, losses.domain_adversarial_loss(full[:, 0], full[:, 1]))
    assert torch.equal(classification, losses.classification_loss(full, soft.float()))


def test_class_distributions(soft):
    ids = torch.tensor([2, 0], dtype=torch.int32)
    assert losses.class_distributions(ids, 3).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    assert losses.class_distributions(ids, 3, torch.float64).dtype == torch.float64
    assert torch.equal(losses.class_distributions(soft, C, soft.dtype), soft)


def test_log_of_the_mean_prediction(logits):
    expected = np.log(_softmax(logits.numpy()).mean(0))
    np.testing.assert_allclose(losses.log_mean_probs(logits), expected, rtol=1e-12)
    never = logits.float()
    never[:, 1] = -300.0  # a probability below what float32 holds
    assert -320 < float(losses.log_mean_probs(never)[1]) < -290
