"""Pseudo-labels, training on them, and FixMatch against their equations, written a second time in plain loops."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from uda_selftraining import FixMatch, PseudoLabel, SelfTraining
from uda_selftraining.pseudo_label import confident_labels, most_confident_of_each_class

import uda
from uda.pseudo import pseudo_cross_entropy
from uda.testing import check_plugin


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(v - max(z)) for v in z]
    return [v / sum(e) for v in e]


def random_logits(seed: int, n: int = 12, classes: int = 4, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def make_step(weak, strong=None, progress=0.5, pseudo=None):
    views = {"weak": SimpleNamespace(logits=weak), "strong": SimpleNamespace(logits=strong)}
    views["x"] = views["weak"]
    target = SimpleNamespace(view=views.__getitem__, pseudo=pseudo, logits=weak)
    return SimpleNamespace(target=target, progress=progress)


def fixmatch_value(plugin, weak, strong):
    step = make_step(weak, strong)
    step.target.pseudo = plugin.pseudo_label(step)
    (value,) = plugin.refine_classifier(step).values()
    return value


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.9])
def test_fixmatch_against_loops(threshold):
    weak, strong = random_logits(0), random_logits(1)
    total = 0.0
    for w, s in zip(weak.double().tolist(), strong.double().tolist(), strict=True):
        p = softmax(w)
        if max(p) > threshold:
            total -= math.log(softmax(s)[p.index(max(p))])
    got = fixmatch_value(FixMatch(weight=0.5, threshold=threshold), weak, strong)
    assert float(got) == pytest.approx(0.5 * total / len(weak), rel=1e-5)


def test_fixmatch_gradient_is_on_the_strong_view_alone():
    weak = random_logits(0).double().requires_grad_()
    strong = random_logits(1).double().requires_grad_()
    value = fixmatch_value(FixMatch(threshold=0.8), weak, strong)
    grad_weak, grad = torch.autograd.grad(value, [weak, strong], allow_unused=True)
    assert grad_weak is None
    expected = np.zeros(strong.shape)
    for i, (w, s) in enumerate(zip(weak.tolist(), strong.tolist(), strict=True)):
        p, q = softmax(w), softmax(s)
        if max(p) > 0.8:
            expected[i] = [(v - (c == p.index(max(p)))) / len(weak) for c, v in enumerate(q)]
    assert 0 < (expected.any(1)).sum() < len(weak)
    np.testing.assert_allclose(grad.numpy(), expected, rtol=1e-5, atol=1e-9)


def test_cross_entropy_takes_weights_masks_and_distributions():
    logits = random_logits(2, n=6)
    g = torch.Generator().manual_seed(3)
    y, weight = torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(6, generator=g)
    keep, soft = torch.tensor([True, False, True, True, False, True]), torch.rand(6, 4, generator=g).softmax(1)
    log_p = [[math.log(v) for v in softmax(row)] for row in logits.double().tolist()]
    hard = [-log_p[i][int(y[i])] for i in range(6)]
    from_soft = [-sum(float(soft[i, c]) * log_p[i][c] for c in range(4)) for i in range(6)]
    w, m = weight.tolist(), keep.double().tolist()

    def value(mean="batch", **given):
        return float(pseudo_cross_entropy(logits, uda.PseudoLabels(y, **given), mean))

    assert value() == pytest.approx(sum(hard) / 6, rel=1e-5)
    assert value(weight=weight, keep=keep) == pytest.approx(
        sum(a * b * c for a, b, c in zip(w, m, hard, strict=True)) / 6, rel=1e-5
    )
    assert value("kept", keep=keep) == pytest.approx(sum(a * b for a, b in zip(m, hard, strict=True)) / 4, rel=1e-5)
    assert value(soft=soft) == pytest.approx(sum(from_soft) / 6, rel=1e-5)
    assert value("kept", keep=torch.zeros(6, dtype=torch.bool)) == 0


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_share_of_each_class(share):
    g = torch.Generator().manual_seed(0)
    y, confidence = torch.randint(0, 5, (60,), generator=g), torch.rand(60, generator=g)
    y[y == 3] = 2  # a class that nothing is predicted as
    keep = most_confident_of_each_class(confidence, y, share)
    for c in range(5):
        rows = [i for i in range(60) if int(y[i]) == c]
        best = sorted(rows, key=lambda i: -float(confidence[i]))[: math.ceil(share * len(rows) - 1e-9)]
        assert {i for i in rows if keep[i]} == set(best)


def test_labels_of_an_epoch_grow_with_the_run():
    plugin = PseudoLabel(update="epoch", threshold=0.5, share_start=0.25, share=0.75, soft=True)
    plugin.build(SimpleNamespace(sizes={"t": 40}, target_name="t", num_classes=4))
    logits = random_logits(5, n=40)
    p = torch.tensor([softmax(r) for r in logits.double().tolist()])
    kept = []
    for progress in (0.0, 1.0):
        pools = uda.Pools({}, SimpleNamespace(logits=logits))
        plugin.refresh(SimpleNamespace(progress=progress), pools)
        index = torch.tensor([7, 3, 39])
        found = plugin.pseudo_label(SimpleNamespace(target=SimpleNamespace(index=index), progress=0.5))
        assert torch.equal(found.y, p.argmax(1)[index])
        torch.testing.assert_close(found.soft, p[index].float())
        share = 0.25 + 0.5 * progress
        expected = most_confident_of_each_class(p.max(1).values, p.argmax(1), share) & (p.max(1).values > 0.5)
        assert torch.equal(plugin.kept, expected)
        assert torch.equal(found.keep, expected[index])
        kept.append(int(plugin.kept.sum()))
    assert kept[0] < kept[1]


def test_labels_of_a_step():
    logits = random_logits(6).requires_grad_()
    found = PseudoLabel(threshold=0.7, view="weak", soft=True).pseudo_label(make_step(logits))
    p = torch.tensor([softmax(r) for r in logits.double().tolist()])
    assert torch.equal(found.y, p.argmax(1))
    assert torch.equal(found.keep, p.max(1).values > 0.7)
    torch.testing.assert_close(found.soft, p.float())
    assert not found.soft.requires_grad
    assert not PseudoLabel(threshold=0.7, warmup=0.6).pseudo_label(make_step(logits, progress=0.5)).keep.any()
    assert confident_labels(logits, 0.0).keep.all()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FixMatch(threshold=1.0), "threshold"),
        (lambda: PseudoLabel(share=0.5), "update: epoch"),
        (lambda: PseudoLabel(update="epoch", view="weak"), "leave view at x"),
        (lambda: PseudoLabel(view="stong"), "'strong'"),
        (lambda: PseudoLabel(update="epch"), "'epoch'"),
        (lambda: PseudoLabel(update="epoch", share=0.0), "share"),
        (lambda: SelfTraining(mean="sum"), "unknown mean.*batch, kept"),
        (lambda: SelfTraining(weight=-1.0), "negative"),
        (lambda: uda.UDA("identity", {"refine": SelfTraining()}, num_classes=3, input_shape=[6]), "no plugin gives"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(uda.UDAError, match=text):
        make()


# ------------------------------------------------------------------------------------------- in a model


def model_step(plugins, seed=0, rows=16):
    """A real step of a small model with three views of the target."""
    torch.manual_seed(seed)
    sizes = {"source": rows, "target": rows}
    model = uda.UDA(
        "identity", plugins, bottleneck=8, num_classes=3, input_shape=[6], forward_mode="separate", sizes=sizes
    )
    g = torch.Generator().manual_seed(9)
    x = torch.randn(rows, 6, generator=g)
    noisy = {"x": x, **{v: x + s * torch.randn(rows, 6, generator=g) for v, s in (("weak", 0.1), ("strong", 1.0))}}
    y = torch.randint(0, 3, (rows,), generator=g)
    data = {"sources": {"source": {"x": x, "y": y}}, "target": {**noisy, "index": torch.arange(rows)}}
    return model, uda.Step(model, data, 0.5, 0, 0)


def run_hooks(model, step):
    _, step.target.pseudo = model.hooks.first("pseudo_label", step=step)
    return dict(model.hooks.each("refine_classifier", step=step))


def test_fixmatch_is_labeller_and_refiner_in_one():
    """Labels of the weak view and training on the strong one: the two plugins together are FixMatch."""
    whole = run_hooks(*model_step({"f": FixMatch(weight=0.7, threshold=0.4)}))["f"]["strong"]
    parts = {"p": PseudoLabel(threshold=0.4, view="weak"), "s": SelfTraining(weight=0.7, view="strong")}
    assert torch.equal(run_hooks(*model_step(parts))["s"]["self_training"], whole)
    assert whole.item() > 0


def test_an_earlier_labeller_is_believed():
    model, step = model_step({"p": PseudoLabel(threshold=0.0), "f": FixMatch(threshold=0.99)})
    value = run_hooks(model, step)["f"]["strong"]
    assert torch.equal(step.target.pseudo.y, step.target.logits.argmax(1))
    expected = torch.nn.functional.cross_entropy(step.target.view("strong").logits, step.target.pseudo.y)
    torch.testing.assert_close(value, expected)


def test_labelling_leaves_the_weak_view_to_others():
    """A plugin that trains on the weak view gets its gradient, though FixMatch has labelled by this view before."""
    plugins = {"f": FixMatch(threshold=0.4), "s": SelfTraining(view="weak")}
    model, step = model_step(plugins)
    loss = run_hooks(model, step)["s"]["self_training"]
    grad = torch.autograd.grad(loss, list(model.bottleneck.parameters()))
    assert max(float(g.abs().max()) for g in grad) > 0


def test_descent_carries_labels_to_the_strong_view():
    """Confidence moves from the weak to the strong view where only the objective is minimised."""
    model, step = model_step({"f": FixMatch(threshold=0.4)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = last = None
    for _ in range(30):
        step = uda.Step(model, _data_of(step), 0.5, 0, 0)
        loss = run_hooks(model, step)["f"]["strong"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        agree = (step.target.view("strong").logits.argmax(1) == step.target.pseudo.y).float().mean()
        first, last = first if first is not None else float(agree), float(agree)
    assert last > first


def _data_of(step):
    target = {name: view.x for name, view in step.target.views.items()} | {"index": step.target.index}
    return {"sources": {"source": {"x": step.source.x, "y": step.source.y}}, "target": target}


LABELS = {"pseudo": {"class_path": "uda_selftraining.pseudo_label.PseudoLabel", "init_args": {"threshold": 0.3}}}
CASES = [
    (FixMatch, {"init_args": {"threshold": 0.4}}),
    (PseudoLabel, {"init_args": {"threshold": 0.3, "update": "epoch", "share": 0.5, "soft": True}}),
    (SelfTraining, {"partners": LABELS}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "given"), CASES, ids=[c.__name__ for c, _ in CASES])
def test_plugin(cls, given):
    assert not check_plugin(cls, ddp=False, **given).warnings


def test_aligner_labeller_and_refiner_together():
    """DANN aligns, PseudoLabel labels, SelfTraining and MCC refine, in one model."""
    partners = {
        "align": {"class_path": "DANN", "init_args": {"hidden": 8}},
        "refine": {"class_path": "MCC"},
        **LABELS,
    }
    report = check_plugin(SelfTraining, partners=partners, ddp=False, only=["lifecycle", "liveness", "resume"])
    assert report.objectives == ["self_training"]
