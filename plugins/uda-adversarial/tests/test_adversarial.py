"""DANN and CDAN against their equations, written a second time in numpy and plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from uda_adversarial import ADDA, BSP, CDAN, DANN, MCD, MDD, SDAT, MCDPhases, ToAlign

import uda
from uda.testing import CheckFailed, check_plugin, check_plugins_ddp

SMALL = {"hidden": 16}


def fake_step(source, target, progress=0.5, source_logits=None, target_logits=None):
    """What the plugins read of a step."""
    pooled = {"features": source, "logits": source_logits}
    on_target = SimpleNamespace(features=target, logits=target_logits)
    return SimpleNamespace(progress=progress, pooled=pooled.__getitem__, target=on_target)


def fake_model(features=4, classes=3):
    return SimpleNamespace(feature_dim=features, num_classes=classes, base_seed=7)


def built(cls, model=None, **options):
    torch.manual_seed(0)
    plugin = cls(**{"hidden": 5, "layers": 1, "batch_norm": False, **options})
    plugin.build(model or fake_model())
    return plugin


def mlp_logit(plugin, x: np.ndarray) -> np.ndarray:
    """The discriminator's logit, layer by layer in numpy."""
    linears = [m for m in plugin.discriminator.net if isinstance(m, nn.Linear)]
    for i, layer in enumerate(linears):
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        if i < len(linears) - 1:
            x = np.maximum(x, 0)
    return x[:, 0]


def bce(logits: np.ndarray, label: float, weights: np.ndarray) -> float:
    total = 0.0
    for z, w in zip(logits, weights, strict=True):
        p = 1 / (1 + math.exp(-z))
        total -= w * (label * math.log(p) + (1 - label) * math.log(1 - p))
    return total / weights.sum()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_dann_loss(weight):
    plugin = built(DANN, weight=weight)
    source, target = torch.randn(6, 4), torch.randn(3, 4)
    (loss,) = plugin.align_features(fake_step(source, target)).values()
    zs, zt = (mlp_logit(plugin, x.double().numpy()) for x in (source, target))
    expected = weight * 0.5 * (bce(zs, 1, np.ones(6)) + bce(zt, 0, np.ones(3)))
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("progress", [0.0, 0.2, 1.0])
def test_gradient_is_reversed_for_the_features_only(progress):
    """Features get minus the ramp times the gradient, the discriminator the gradient itself."""
    plugin = built(DANN, reversal=0.8)
    source, target = torch.randn(6, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    (loss,) = plugin.align_features(fake_step(source, target, progress)).values()
    parameters = list(plugin.discriminator.parameters())
    got = torch.autograd.grad(loss, [source, target, *parameters])

    def forward_loss():  # the same game without reversal
        zs, zt = plugin.discriminator(source)[:, 0], plugin.discriminator(target)[:, 0]
        return (torch.log1p(torch.exp(-zs)).mean() + torch.log1p(torch.exp(zt)).mean()) / 2

    plain = torch.autograd.grad(forward_loss(), [source, target, *parameters])
    ramp = 0.8 * (2 / (1 + math.exp(-10 * progress)) - 1)
    for g, p in zip(got[:2], plain[:2], strict=True):
        torch.testing.assert_close(g, -ramp * p, rtol=1e-4, atol=1e-7)
    for g, p in zip(got[2:], plain[2:], strict=True):
        torch.testing.assert_close(g, p, rtol=1e-4, atol=1e-7)


def test_a_step_of_the_features_confuses_the_discriminator():
    plugin = built(DANN)
    source, target = torch.randn(20, 4) + 1, (torch.randn(20, 4) - 1)
    optimizer = torch.optim.SGD(plugin.parameters(), lr=0.5)
    for _ in range(50):  # a discriminator that has learnt something
        optimizer.zero_grad()
        (loss,) = plugin.align_features(fake_step(source, target)).values()
        loss.backward()
        optimizer.step()
    moved = target.clone().requires_grad_()
    (before,) = plugin.align_features(fake_step(source, moved)).values()
    (grad,) = torch.autograd.grad(before, [moved])
    (after,) = plugin.align_features(fake_step(source, target - 1.0 * grad)).values()
    assert after > before


def joint(features: torch.Tensor, logits: torch.Tensor) -> np.ndarray:
    """Outer product of features and softmax, one entry at a time."""
    rows = []
    for f, z in zip(features.tolist(), logits.tolist(), strict=True):
        e = [math.exp(v - max(z)) for v in z]
        rows.append([ev / sum(e) * fv for ev in e for fv in f])
    return np.array(rows)


def certainty(logits: torch.Tensor) -> np.ndarray:
    """``1 + exp(-H)``, divided by its mean."""
    out = []
    for z in logits.double().tolist():
        e = [math.exp(v) for v in z]
        p = [v / sum(e) for v in e]
        out.append(1 + math.exp(sum(v * math.log(v) for v in p)))
    return np.array(out) / np.mean(out)


@pytest.mark.parametrize("entropy", [False, True])
def test_cdan_loss(entropy):
    plugin = built(CDAN, entropy=entropy)
    source, target = torch.randn(6, 4), torch.randn(3, 4)
    ys, yt = 2 * torch.randn(6, 3), 2 * torch.randn(3, 3)
    (loss,) = plugin.align_features(fake_step(source, target, 0.5, ys, yt)).values()
    zs, zt = mlp_logit(plugin, joint(source, ys)), mlp_logit(plugin, joint(target, yt))
    ws, wt = (certainty(ys), certainty(yt)) if entropy else (np.ones(6), np.ones(3))
    assert float(loss) == pytest.approx(0.5 * (bce(zs, 1, ws) + bce(zt, 0, wt)), rel=1e-4)


def test_cdan_randomised_map_keeps_inner_products():
    """``<T(f, g), T(f', g')>`` is ``<f, f'> <g, g'>`` in the mean over the random maps."""
    plugin = built(CDAN, fake_model(8, 5), max_width=10, random_width=40000)
    features, logits = torch.randn(2, 8), 3 * torch.randn(2, 5)
    assert plugin.randomised
    a, b = plugin.joint(features, logits).double()
    exact = np.array(joint(features, logits))
    norms = np.linalg.norm(exact, axis=1)
    assert float(a @ b) == pytest.approx(exact[0] @ exact[1], abs=0.1 * norms.prod())
    assert float(a @ a) == pytest.approx(norms[0] ** 2, rel=0.1)


def test_cdan_maps_only_wide_products():
    assert not built(CDAN, fake_model(4, 3), max_width=12).randomised
    assert built(CDAN, fake_model(4, 3), max_width=11, random_width=7).joint(
        torch.rand(2, 4), torch.rand(2, 3)
    ).shape == (2, 7)


def test_random_map_is_a_function_of_the_seed():
    maps = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        plugin = CDAN(hidden=4, max_width=1, random_width=6)
        plugin.build(fake_model())
        maps.append(plugin.random_map.features_map)
    assert torch.equal(*maps)


def test_classifier_gets_no_gradient_from_cdan():
    plugin = built(CDAN, entropy=True)
    ys, yt = torch.randn(6, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    source = torch.randn(6, 4, requires_grad=True)
    (loss,) = plugin.align_features(fake_step(source, torch.randn(3, 4), 0.5, ys, yt)).values()
    gs, gt, gf = torch.autograd.grad(loss, [ys, yt, source], allow_unused=True)
    assert gs is None
    assert gt is None
    assert gf.abs().max() > 0


@pytest.mark.parametrize("name", ["weight", "reversal"])
def test_negative_arguments_are_refused(name):
    with pytest.raises(uda.UDAError, match="must not be negative"):
        DANN(**{name: -0.1})


CASES = [
    (DANN, SMALL),
    (CDAN, SMALL),
    (CDAN, {**SMALL, "entropy": True, "max_width": 4, "random_width": 8}),
]
IDS = ["DANN", "CDAN", "CDAN+E"]


@pytest.mark.slow
def test_the_widest_case_goes_through_a_run():
    cls, init_args = CASES[-1]
    assert check_plugin(cls, init_args=init_args, ddp=False).objectives == ["domain"]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "init_args"), CASES[:-1], ids=IDS[:-1])
def test_plugin(cls, init_args):
    assert check_plugin(cls, init_args=init_args, ddp=False).objectives == ["domain"]


def aligner(name):
    return {"align": {"class_path": name, "init_args": SMALL}}


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp(
        [
            *((cls, {"init_args": init_args}) for cls, init_args in CASES),
            (MCD, {"init_args": {"head_hidden": 8, "balance": 0.01}}),
            (MCDPhases, {"init_args": {"repeats": 2}}),
            (MDD, {"init_args": {"head_hidden": 8}}),
            (BSP, {"partners": aligner("DANN")}),
            (SDAT, {"init_args": {"rho": 0.2}, "partners": aligner("CDAN")}),
            (ADDA, {"init_args": {"hidden": 8, "pretrain": 0.45}}),
            (ToAlign, {"init_args": SMALL}),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("cls", [DANN, CDAN])
def test_two_sources(cls):
    check_plugin(cls, init_args=SMALL, sources=2, only=["lifecycle", "liveness"])


def test_no_reversal_is_noticed():
    """With the reversal at zero the method trains its discriminator only."""
    with pytest.raises(CheckFailed, match="backbone, bottleneck"):
        check_plugin(DANN, init_args={**SMALL, "reversal": 0.0}, only=["liveness"])
