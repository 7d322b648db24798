"""MCC and entropy minimisation against their equations, written a second time in plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from uda_selftraining import MCC, EntropyMinimisation

import uda
from uda.testing import check_plugin


def fake_step(logits, progress=0.5):
    return SimpleNamespace(target=SimpleNamespace(logits=logits), progress=progress)


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def entropy(p: list[float]) -> float:
    return -sum(v * math.log(v) for v in p if v > 0)


def objective(plugin, logits, progress=0.5):
    (value,) = plugin.refine_classifier(fake_step(logits, progress)).values()
    return value


def class_confusion(logits: torch.Tensor, temperature: float) -> float:
    """Minimum class confusion, one pair of classes at a time."""
    rows = [softmax([v / temperature for v in row]) for row in logits.double().tolist()]
    batch, classes = len(rows), len(rows[0])
    certainty = [1 + math.exp(-entropy(p)) for p in rows]
    weights = [batch * c / sum(certainty) for c in certainty]
    confusion = [
        [sum(w * p[j] * p[k] for w, p in zip(weights, rows, strict=True)) for k in range(classes)]
        for j in range(classes)
    ]
    off_diagonal = 0.0
    for j in range(classes):
        total = sum(confusion[j])
        off_diagonal += sum(confusion[j][k] / total for k in range(classes) if k != j)
    return off_diagonal / classes


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(7, 4), (2, 5), (1, 3)])
def test_mcc_against_loops(temperature, shape):
    logits = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    expected = 0.7 * class_confusion(logits, temperature)
    assert float(objective(MCC(weight=0.7, temperature=temperature), logits)) == pytest.approx(
        expected, rel=1e-5
    )


def test_mcc_bounds():
    sure = 100 * torch.eye(4)
    unsure = torch.zeros(8, 4)
    assert float(objective(MCC(), sure)) == pytest.approx(0.0, abs=1e-6)
    assert float(objective(MCC(), unsure)) == pytest.approx(3 / 4)


@pytest.mark.parametrize("detach", [True, False])
def test_mcc_gradient_is_the_formulas_only_without_detach(detach):
    """Against differences of the value, which is the same either way."""
    logits = 2 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    value = objective(MCC(detach=detach), logits)
    (got,) = torch.autograd.grad(value, [logits])
    assert float(value.detach()) == pytest.approx(class_confusion(logits.detach(), 2.5), rel=1e-6)
    differences = torch.zeros_like(got)
    for at in torch.cartesian_prod(torch.arange(5), torch.arange(3)):
        step = torch.zeros_like(got)
        step[tuple(at)] = 1e-6
        up, down = (class_confusion((logits + s).detach(), 2.5) for s in (step, -step))
        differences[tuple(at)] = (up - down) / 2e-6
    assert torch.allclose(got, differences, rtol=1e-4, atol=1e-7) != detach


def test_mcc_weights_are_constants():
    """The gradient is that of the confusion with the certainty weights held fixed."""
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(objective(MCC(), logits), [logits])
    certainty = torch.tensor(
        [1 + math.exp(-entropy(softmax([v / 2.5 for v in r]))) for r in logits.tolist()]
    ).double()
    weights = 5 * certainty / certainty.sum()

    def held_fixed(z):
        p = (z / 2.5).softmax(1)
        confusion = torch.stack(
            [torch.stack([(weights * p[:, j] * p[:, k]).sum() for k in range(3)]) for j in range(3)]
        )
        confusion = confusion / confusion.sum(1, keepdim=True)
        return (confusion.sum() - confusion.diagonal().sum()) / 3

    (expected,) = torch.autograd.grad(held_fixed(logits), [logits])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_entropy_against_loops():
    logits = 2 * torch.randn(6, 4)
    expected = sum(entropy(softmax(r)) for r in logits.double().tolist()) / 6
    assert float(objective(EntropyMinimisation(weight=0.2), logits)) == pytest.approx(
        0.2 * expected, rel=1e-5
    )


def test_information_against_loops():
    """``log C + mean H(p_i) - H(mean p_i)``: zero for sure predictions that use all classes alike."""
    logits = 2 * torch.randn(6, 4)
    rows = [softmax(r) for r in logits.double().tolist()]
    mean = [sum(p[c] for p in rows) / 6 for c in range(4)]
    expected = math.log(4) + sum(map(entropy, rows)) / 6 - entropy(mean)
    plugin = EntropyMinimisation(weight=1.0, diversity=True)
    assert float(objective(plugin, logits)) == pytest.approx(expected, rel=1e-5)
    assert float(objective(plugin, 100 * torch.eye(4))) == pytest.approx(0.0, abs=1e-5)
    assert float(objective(plugin, 100 * torch.eye(4)[[0, 0, 0]])) == pytest.approx(math.log(4), abs=1e-5)


@pytest.mark.parametrize("cls", [MCC, EntropyMinimisation])
def test_ramps_scale_the_objective(cls):
    logits = torch.randn(5, 3)
    full = float(objective(cls(weight=1.0), logits))
    for progress in (0.0, 0.1, 1.0):
        warm = 2 / (1 + math.exp(-10 * progress)) - 1
        for ramp, factor in (("none", 1.0), ("linear", progress), ("warm_start", warm)):
            got = float(objective(cls(weight=1.0, ramp=ramp), logits, progress))
            assert got == pytest.approx(factor * full, rel=1e-5, abs=1e-9)
    with pytest.raises(uda.UDAError, match=r"'linaer'.*'linear'"):
        cls(ramp="linaer")


@pytest.mark.parametrize("cls", [MCC, EntropyMinimisation])
def test_descent_sharpens_the_predictions(cls):
    logits = (0.5 * torch.randn(30, 3, generator=torch.Generator().manual_seed(1))).requires_grad_()
    before = sum(entropy(softmax(r)) for r in logits.tolist())
    for _ in range(20):
        (grad,) = torch.autograd.grad(objective(cls(weight=1.0), logits), [logits])
        logits = (logits - 5 * grad).detach().requires_grad_()
    assert sum(entropy(softmax(r)) for r in logits.tolist()) < before


def test_bad_arguments_are_refused():
    with pytest.raises(uda.UDAError, match="temperature must be positive"):
        MCC(temperature=0.0)
    with pytest.raises(uda.UDAError, match="must not be negative"):
        EntropyMinimisation(weight=-1.0)


CASES = [(MCC, {}), (EntropyMinimisation, {}), (EntropyMinimisation, {"diversity": True, "ramp": "linear"})]
IDS = ["MCC", "entropy", "information"]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "init_args"), CASES, ids=IDS)
def test_plugin(cls, init_args):
    check_plugin(cls, init_args=init_args, ddp=False)
