"""DAN, JAN, CORAL, DSAN and AFN against their equations, written a second time in numpy and plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_discrepancy import AFN, CAN, CORAL, DAN, DSAN, DSBN, JAN, AdaBN
from uda_discrepancy.afn import hard_norm_loss, stepwise_norm_loss
from uda_discrepancy.coral import coral_loss
from uda_discrepancy.dsan import local_mmd
from uda_discrepancy.jan import joint_mmd

import uda
from uda.kernels import multi_kernel_mmd
from uda.testing import check_plugin, check_plugins_ddp

N, M, F, C = 6, 6, 4, 3


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kernel(x: np.ndarray) -> np.ndarray:
    """``sum_a exp(-D / (2 alpha_a v))`` with alpha = 1/8 ... 2 and v the mean D over distinct pairs."""
    n = len(x)
    d = np.array([[((a - b) ** 2).sum() for b in x] for a in x])
    v = d.sum() / (n * n - n)
    return sum(np.exp(-d / (2 * a * v)) for a in (0.125, 0.25, 0.5, 1, 2))


def unbiased(k: np.ndarray, n: int) -> float:
    m = len(k) - n
    ss, tt, st = k[:n, :n], k[n:, n:], k[:n, n:]
    return (ss.sum() - np.trace(ss)) / (n * n - n) + (tt.sum() - np.trace(tt)) / (m * m - m) - 2 * st.mean()


def linear(k: np.ndarray, n: int) -> float:
    s, t = range(0, n - 1, 2), range(n, 2 * n - 1, 2)
    return np.mean([k[i, i + 1] + k[j, j + 1] - k[i, j + 1] - k[i + 1, j] for i, j in zip(s, t, strict=True)])


class Fake:
    """What the plugins read of a step, with leaves to take gradients of."""

    def __init__(self, seed=0, shift=1.0, n=N, m=M, dtype=torch.float64, progress=0.5):
        random = torch.Generator().manual_seed(seed)

        def draw(rows, width, offset=0.0):
            return (torch.randn(rows, width, generator=random, dtype=dtype) + offset).requires_grad_()

        self.source = {"features": draw(n, F), "logits": draw(n, C), "y": torch.arange(n) % C}
        self.target = SimpleNamespace(features=draw(m, F, shift), logits=draw(m, C, shift))
        self.progress = progress
        self.leaves = [self.source["features"], self.source["logits"], self.target.features, self.target.logits]

    def pooled(self, name):
        return self.source[name]

    def numpy(self):
        return [x.detach().double().numpy() for x in self.leaves]


def objective(plugin, step) -> torch.Tensor:
    return sum(plugin.align_features(step).values())


# ------------------------------------------------------------------------------------------------ equations


def test_dan():
    step = Fake()
    fs, zs, ft, zt = step.numpy()
    expected = {
        ("features", "linear"): linear(kernel(np.concatenate([fs, ft])), N),
        ("both", "unbiased"): unbiased(kernel(np.concatenate([fs, ft])), N)
        + unbiased(kernel(np.concatenate([zs, zt])), N),
    }
    for (layers, estimator), value in expected.items():
        got = objective(DAN(weight=0.3, layers=layers, estimator=estimator), step)
        assert float(got) == pytest.approx(0.3 * value, rel=1e-9)


@pytest.mark.parametrize("estimator", ["linear", "unbiased"])
def test_jan(estimator):
    step = Fake()
    fs, zs, ft, zt = step.numpy()
    p = softmax(np.concatenate([zs, zt]))
    on_probs = np.array([[math.exp(-((a - b) ** 2).sum() / (2 * 0.92**2)) for b in p] for a in p])
    k = kernel(np.concatenate([fs, ft])) * on_probs
    expected = {"linear": linear, "unbiased": unbiased}[estimator](k, N)
    assert float(objective(JAN(estimator=estimator), step)) == pytest.approx(expected, rel=1e-9)


def test_jan_reaches_the_classifier():
    step = Fake()
    grads = torch.autograd.grad(objective(JAN(), step), step.leaves)
    assert all(g.abs().max() > 0 for g in grads)


def test_adversarial_maps_ascend_and_layers_descend():
    """At the identity the features get JAN's gradient, and the maps minus the gradient of what they give."""
    step, plain = Fake(dtype=torch.float32), JAN()
    plugin = JAN(adversarial=True, lr_scale=0.2)
    plugin.build(SimpleNamespace(feature_dim=F, num_classes=C))
    assert plugin.param_groups(None)[0]["lr_scale"] == 0.2
    value = objective(plugin, step)
    assert float(value) == pytest.approx(float(objective(plain, step)), rel=1e-5)
    got = torch.autograd.grad(value, step.leaves, retain_graph=True)
    expected = torch.autograd.grad(objective(plain, step), step.leaves)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)
    parameters = list(plugin.maps.parameters())
    ascent = torch.autograd.grad(value, parameters)
    with torch.no_grad():
        for p, g in zip(parameters, ascent, strict=True):
            p -= 0.5 * g  # a descent step of the optimiser
    assert float(objective(plugin, step)) > float(value)


@pytest.mark.parametrize("layer", ["logits", "features"])
def test_coral(layer):
    step = Fake()
    fs, zs, ft, zt = step.numpy()
    s, t = {"features": (fs, ft), "logits": (zs, zt)}[layer]
    gap = sum(
        (np.cov(s.T)[i, j] - np.cov(t.T)[i, j]) ** 2 for i in range(s.shape[1]) for j in range(s.shape[1])
    )
    mean = ((s.mean(0) - t.mean(0)) ** 2).sum() / s.shape[1]
    d = s.shape[1]
    assert float(objective(CORAL(layer=layer), step)) == pytest.approx(gap / (4 * d * d), rel=1e-9)
    assert float(objective(CORAL(weight=2.0, layer=layer, normalise="none"), step)) == pytest.approx(2 * gap, rel=1e-9)
    assert float(objective(CORAL(layer=layer, means=True), step)) == pytest.approx(gap / (4 * d * d) + mean, rel=1e-9)


def lmmd_loops(fs, ys, ft, pt, common: bool) -> float:
    """Class by class, the weights of each sample from its label or probability."""
    k = kernel(np.concatenate([fs, ft]))
    n, classes = len(fs), pt.shape[1]
    kept = [c for c in range(classes) if c in ys and (not common or c in pt.argmax(1))]
    total = 0.0
    for c in kept:
        ws = [(ys[i] == c) / sum(ys == c) for i in range(n)]
        wt = [pt[j, c] / pt[:, c].sum() for j in range(len(ft))]
        total += sum(ws[i] * ws[j] * k[i, j] for i in range(n) for j in range(n))
        total += sum(wt[i] * wt[j] * k[n + i, n + j] for i in range(len(ft)) for j in range(len(ft)))
        total -= 2 * sum(ws[i] * wt[j] * k[i, n + j] for i in range(n) for j in range(len(ft)))
    return total / (max(len(kept), 1) if common else classes)


@pytest.mark.parametrize("classes", ["common", "all"])
@pytest.mark.parametrize("y", [[0, 1, 2, 0, 1, 2], [0, 0, 1, 1, 1, 0]])
def test_dsan(classes, y):
    step = Fake(progress=0.2, seed=3)
    step.target.logits = (step.target.logits + torch.tensor([9.0, 0.0, 0.0])).detach().requires_grad_()
    step.source["y"] = torch.tensor(y)
    fs, _, ft, _ = step.numpy()
    pt = softmax(step.target.logits.detach().numpy())
    ramp = 2 / (1 + math.exp(-10 * 0.2)) - 1
    expected = 0.5 * ramp * lmmd_loops(fs, np.array(y), ft, pt, classes == "common")
    got = objective(DSAN(classes=classes), step)
    assert float(got) == pytest.approx(expected, rel=1e-9)
    soft = torch.nn.functional.one_hot(step.source["y"], C).double()
    value = local_mmd(step.pooled("features"), soft, step.target.features, torch.as_tensor(pt), classes)
    assert float(0.5 * ramp * value) == pytest.approx(expected, rel=1e-9)


def test_dsan_gradient_into_the_weights_is_an_option():
    step = Fake()
    for soft in (False, True):
        (g,) = torch.autograd.grad(
            objective(DSAN(soft_gradient=soft), step), [step.target.logits], allow_unused=True
        )
        assert (g is not None and float(g.abs().max()) > 0) == soft


def test_dsan_without_a_common_class_is_zero():
    step = Fake()
    step.source["y"] = torch.zeros(N, dtype=torch.long)
    step.target.logits = torch.tensor([[0.0, 5.0, 0.0]]).double().expand(M, -1)
    value = objective(DSAN(), step)
    grads = torch.autograd.grad(value, [step.source["features"], step.target.features])
    assert float(value) == 0
    assert all(float(g.abs().max()) == 0 for g in grads)


def test_hard_norm():
    step = Fake()
    fs, _, ft, _ = step.numpy()
    expected = sum((np.mean([math.sqrt(sum(v * v for v in f)) for f in x]) - 7.0) ** 2 for x in (fs, ft))
    assert float(objective(AFN(weight=0.1, variant="hard", radius=7.0), step)) == pytest.approx(0.1 * expected)


def test_stepwise_norm_pulls_each_feature_outwards():
    """Value step^2 a domain, gradient ``-2 step / B f / |f|``."""
    step = Fake()
    value = objective(AFN(weight=0.2, step=0.5), step)
    assert float(value) == pytest.approx(0.2 * 2 * 0.25)
    for leaf in (step.source["features"], step.target.features):
        (got,) = torch.autograd.grad(value, [leaf], retain_graph=True)
        rows = [-0.2 * 2 * 0.5 / len(leaf) * f / f.norm() for f in leaf.detach()]
        torch.testing.assert_close(got, torch.stack(rows))


def test_dead_features_have_a_finite_norm_gradient():
    dead = torch.zeros(3, F, requires_grad=True)
    for loss in (stepwise_norm_loss(dead), hard_norm_loss(dead)):
        (grad,) = torch.autograd.grad(loss, [dead])
        assert grad.isfinite().all()


def test_dropout_keeps_norms_in_training_only():
    plugin = AFN()
    plugin.build(SimpleNamespace(bottleneck=torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Dropout(0.5))))
    features = torch.rand(2000, 50)
    dropped = plugin.transform_features(torch.nn.functional.dropout(features, 0.5))
    assert float(dropped.square().sum()) == pytest.approx(float(features.square().sum()), rel=0.02)
    assert plugin.eval().transform_features(features) is None
    off = AFN(keep_norm=False)
    off.build(SimpleNamespace(bottleneck=torch.nn.Dropout(0.5)))
    assert off.transform_features(features) is None


# ---------------------------------------------------------------------------------------------- do they work

LOSSES = {
    "mmd": lambda s, t, y: multi_kernel_mmd(s, t, "unbiased"),
    "linear mmd": lambda s, t, y: multi_kernel_mmd(s, t, "circular"),
    "jmmd": lambda s, t, y: joint_mmd((s, s.softmax(1)), (t, t.softmax(1))),
    "lmmd": lambda s, t, y: local_mmd(s, y, t, torch.nn.functional.one_hot(y, C).float()),
}


@pytest.mark.parametrize("name", LOSSES)
def test_descent_brings_the_domains_together(name):
    """The target cloud moves onto the source's, which is one step away in each coordinate."""
    random = torch.Generator().manual_seed(0)
    y = torch.arange(30) % C
    source = torch.randn(30, F, generator=random)
    target = (torch.randn(30, F, generator=random) + 1.0).requires_grad_()
    before = float((source.mean(0) - target.mean(0)).norm())
    for _ in range(60):
        (grad,) = torch.autograd.grad(LOSSES[name](source, target, y), [target])
        target = (target - 5 * grad).detach().requires_grad_()
    assert float((source.mean(0) - target.mean(0)).norm()) < 0.5 * before


def test_coral_descent_matches_covariances():
    random = torch.Generator().manual_seed(0)
    source = torch.randn(40, F, generator=random)
    target = (3 * torch.randn(40, F, generator=random)).requires_grad_()
    before = float(coral_loss(source, target))
    for _ in range(100):
        (grad,) = torch.autograd.grad(coral_loss(source, target), [target])
        target = (target - 5 * grad).detach().requires_grad_()
    assert float(coral_loss(source, target)) < 0.01 * before


# ------------------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize("cls", [DAN, JAN, CORAL, DSAN, AFN])
def test_bad_arguments_are_refused(cls):
    with pytest.raises(uda.UDAError, match="weight must not be negative"):
        cls(weight=-1.0)
    with pytest.raises(uda.UDAError, match=r"'linaer'.*'linear'"):
        cls(ramp="linaer")


@pytest.mark.parametrize(
    ("cls", "option"),
    [(DAN, "layers"), (DAN, "estimator"), (JAN, "estimator"), (CORAL, "layer"), (DSAN, "classes"), (AFN, "variant")],
)
def test_unknown_choices_are_refused(cls, option):
    with pytest.raises(uda.UDAError, match=f"{cls.__name__}: unknown {option} 'other'"):
        cls(**{option: "other"})


CASES = {
    "DAN": (DAN, {"layers": "both"}, ["mmd_features", "mmd_logits"]),
    "JAN-A": (JAN, {"adversarial": True}, ["jmmd"]),
    "CORAL": (CORAL, {"layer": "features", "means": True}, ["coral", "mean"]),
    "DSAN": (DSAN, {}, ["lmmd"]),
    "AFN": (AFN, {}, ["norm"]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n != "JAN-A" else n for n in CASES])
def test_plugin(name):
    cls, init_args, objectives = CASES[name]
    report = check_plugin(cls, init_args=init_args, ddp=False)
    assert report.objectives == objectives
    assert not report.warnings


@pytest.mark.slow
def test_two_sources():
    check_plugin(DAN, sources=2, only=["lifecycle", "liveness"])
    check_plugin(DSAN, sources=2, only=["lifecycle"])


@pytest.mark.slow
def test_under_two_processes():
    normed = {"model_args": {"forward_mode": "separate", "bottleneck_norm": "batch"}}
    check_plugins_ddp(
        [
            *((cls, {"init_args": init_args}) for cls, init_args, _ in CASES.values()),
            (CAN, {"init_args": {"min_samples": 1}, **normed}),
            (AdaBN, normed),
            (AdaBN, {"init_args": {"statistics": "running"}, **normed}),
            (DSBN, {"partners": {"align": {"class_path": "DAN"}}, **normed}),
        ]
    )
