"""ParetoDA against its equations in plain loops, and all weighers in training."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from uda_pareto import MGDA, CAGrad, FixedWeights, ParetoDA, PCGrad, UncertaintyWeights
from uda_pareto.mimic import ClassDomainNets, class_domain_loss, mimicking_loss, refine
from uda_pareto.pareto import still_statistics

import uda
from uda.testing import check_plugin, check_plugins_ddp, forks

SMALL = {"hidden": 8}


def softmax(z):
    e = [math.exp(v) for v in z]
    return [v / sum(e) for v in e]


def test_refinement_is_bayes():
    logits, domain = torch.randn(5, 3), torch.randn(5, 3)
    got = refine(logits, domain).softmax(1)
    for i in range(5):
        p = softmax(logits[i].tolist())
        joint = [p[c] / (1 + math.exp(domain[i, c].item())) for c in range(3)]  # p(y | x) p(target | x, y)
        assert got[i].tolist() == pytest.approx([v / sum(joint) for v in joint], rel=1e-4)
    raw = refine(logits, domain, raw=True)
    assert raw[0, 0].item() == pytest.approx(logits[0, 0].item() / (1 + math.exp(domain[0, 0].item())), rel=1e-5)


def test_mimicking_loss_is_negative_mutual_information():
    z = 2 * torch.randn(6, 4)
    rows = [softmax(r) for r in z.double().tolist()]
    mean = [sum(r[c] for r in rows) / 6 for c in range(4)]
    information = -sum(v * math.log(v) for v in mean) + sum(v * math.log(v) for r in rows for v in r) / 6
    assert float(mimicking_loss(z)) == pytest.approx(math.log(4) - information, rel=1e-4)
    assert float(mimicking_loss(50 * torch.eye(4))) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("last_only", [False, True])
def test_class_domain_loss_against_loops(last_only):
    s, t, belief = torch.randn(5, 3), torch.randn(4, 3), torch.rand(4, 3)
    y = torch.tensor([0, 2, 1, 2, 2])
    total = 0.0
    for c in range(3):
        mine = [int(y[-1 if last_only else i]) == c for i in range(5)]
        total += sum(m * math.log1p(math.exp(-s[i, c])) for i, m in enumerate(mine)) / 5
        total += sum(float(belief[i, c]) * math.log1p(math.exp(t[i, c])) for i in range(4)) / 4
    assert float(class_domain_loss(s, y, t, belief, last_only)) == pytest.approx(total / 3 / 2, rel=1e-5)
    assert torch.equal(class_domain_loss(s, y, t, belief), class_domain_loss(s, F.one_hot(y, 3), t, belief))


def test_class_domain_nets_are_one_net_a_class():
    nets, x = ClassDomainNets(4, 3, hidden=6), torch.randn(7, 4)
    got = nets(x)
    for c in range(3):
        h = x
        for i in range(2):
            h = h @ nets.weights[i][c] + nets.biases[i][c, 0]
            h = F.relu((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt())
        expected = (h @ nets.weights[2][c] + nets.biases[2][c, 0])[:, 0]
        torch.testing.assert_close(got[:, c], expected, rtol=1e-4, atol=1e-5)


def test_statistics_stay_still():
    norm, x = nn.BatchNorm1d(3), torch.randn(8, 3) + 2
    before = {k: v.clone() for k, v in norm.state_dict().items()}
    with still_statistics(norm):
        inside = norm(x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    assert torch.equal(inside, norm(x))


class Pull(uda.Plugin):
    """Two objectives that are means over samples, with a head of their own."""

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "probe"):
            self.probe = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def align_features(self, step):
        s, t = step.source.features, step.target.features
        return {"align": self.probe(s).square().mean() - self.probe(t).mean(), "spread": t.square().mean()}


def make(weigher, gate_level="features"):
    torch.manual_seed(0)
    return uda.UDA(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh()), plugins={"pull": Pull(), "weigh": weigher}, bottleneck=5,
        bottleneck_norm="layer", num_classes=3, input_shape=[6], source_names=["source"], gate_level=gate_level,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), schedule=uda.optim.Constant(),
    )  # fmt: skip


def batch(n=8):
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(n, 6, generator=g) + i for i in range(3)]
    y = torch.randint(0, 3, (n,), generator=g)
    return {"sources": {"source": {"x": x[0], "y": y}}, "target": {"x": x[1]}, "held_out": {"x": x[2]}}


class Keep(L.Callback):
    """Keeps gradients and weights of the step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


class Halves(L.LightningDataModule):
    """Each rank gets its rows of one batch."""

    def train_dataloader(self):
        n = 8 // self.trainer.world_size
        rows = slice(self.trainer.global_rank * n, (self.trainer.global_rank + 1) * n)
        cut = torch.utils._pytree.tree_map(lambda v: v[rows], batch())
        return torch.utils.data.DataLoader([cut], batch_size=None, collate_fn=lambda v: v)


def fit(model, devices=1, path=""):
    """Gradients of one step."""
    keep = Keep()
    options = {"strategy": "ddp"} if devices == 2 else {}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[keep, *([Save(path)] if devices == 2 else [])], **options,
    )  # fmt: skip
    trainer.fit(model, datamodule=Halves())
    return keep.grads if devices == 1 else None


def weighers():
    """Weighers whose weights are a function of the whole batch."""
    names = ["classification", "pull/align"]
    found = [MGDA(), PCGrad(level="bottleneck"), CAGrad(level="parameters"), FixedWeights({"pull/align": 0.3})]
    return [*found, UncertaintyWeights(names, start=0.5), ParetoDA(refinement=False, level="bottleneck")]


def recorded(weigher):
    """The weigher, leaving its weights in ``seen``."""
    model = make(weigher)
    first = model.hooks.first

    def watch(hook, **arguments):
        key, found = first(hook, **arguments)
        if hook == "weigh_objectives":
            model.seen = {k: float(torch.as_tensor(v).detach()) for k, v in found.items()}
        return key, found

    model.hooks.first = watch
    return model


@pytest.mark.parametrize("number", range(6))
def test_gate_equals_the_weighted_gradients(number):
    """Objective by objective, summed by hand with the weights that were chosen."""
    weigher = weighers()[number]
    model = recorded(weigher)
    got = fit(model)
    fresh = make(weighers()[number])
    data, total = batch(), {}
    step = uda.Step(fresh, data, 0.0, 0, 0)
    losses = {"classification": F.cross_entropy(step.source.logits, data["sources"]["source"]["y"])}
    for key in ("pull", "weigh"):
        for hook in ("align_features", "refine_classifier"):
            call = getattr(fresh.plugins[key], hook, None)
            bare = key == "weigh" and isinstance(weigher, UncertaintyWeights)
            named = (call() if bare else call(step)) if call else {}
            losses |= {f"{key}/{n}": v for n, v in named.items()}
    parameters = dict(fresh.named_parameters())
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        for p, g in zip(parameters, grads, strict=True):
            shared = p.startswith(("backbone", "bottleneck"))
            if g is not None:
                total[p] = total.get(p, 0) + (model.seen.get(name, 1.0) if shared else 1.0) * g
    total.pop("plugins.weigh.log_variance", None)
    for name, expected in total.items():
        torch.testing.assert_close(got[name], expected, rtol=1e-4, atol=1e-6, msg=name)
    if isinstance(weigher, ParetoDA):
        assert sum(model.seen.values()) == pytest.approx(4, rel=1e-5)


class Save(L.Callback):
    """Writes each rank's gradients."""

    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        torch.save((module.seen, grads), f"{self.path}.{trainer.global_rank}")


def fit_on_rank(numbers, path):
    """One of two processes."""
    for number in numbers:
        fit(recorded(weighers()[number]), devices=2, path=f"{path}.{number}")


@pytest.mark.slow
def test_two_processes_equal_one_with_the_whole_batch(tmp_path):
    numbers = (0, 1, 2, 4)  # the others' objectives are no means over samples, or their weights are given
    wrong, outputs = forks.run_ranks(fit_on_rank, numbers, str(tmp_path / "rank"), folder=tmp_path)
    assert not wrong, outputs
    for number in numbers:
        model = recorded(weighers()[number])
        one = fit(model)
        ranks = [torch.load(tmp_path / f"rank.{number}.{r}") for r in (0, 1)]
        assert ranks[0][0] == ranks[1][0]  # the same weights, bit for bit
        assert ranks[0][0] == pytest.approx(model.seen, rel=1e-4, abs=1e-5)
        for name, grad in one.items():
            torch.testing.assert_close(ranks[0][1][name], grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_mimicking_loss_reaches_the_features_not_the_classifier():
    for trains_head in (False, True):
        model = make(ParetoDA(**SMALL, mimic_trains_head=trains_head))
        found = model.plugins["weigh"].refine_classifier(uda.Step(model, batch(), 0.0, 0, 0))
        inputs = [*model.head.parameters(), *model.bottleneck.parameters(), *model.plugins["weigh"].parameters()]
        head, _, first, *rest = torch.autograd.grad(found["mimic"], inputs, retain_graph=True, allow_unused=True)
        assert (head is not None) == trains_head
        assert first.abs().max() > 0
        own = len(list(model.plugins["weigh"].parameters()))
        assert all(g is None for g in rest[-own:])
        grads = torch.autograd.grad(found["class_domain"], inputs, allow_unused=True)
        assert all(g is None for g in grads[:-own])
        assert all(g is not None for g in grads[-own:])


def test_reference_adds_the_plain_gradients():
    model = recorded(ParetoDA(**SMALL, reference=True, level="parameters"))
    fit(model)
    assert sum(v - 1 for n, v in model.seen.items() if not n.startswith("weigh")) + model.seen[
        "weigh/mimic"
    ] == pytest.approx(4, rel=1e-5)


def test_bad_arguments_are_refused():
    with pytest.raises(uda.UDAError, match="'bottleneck' compares"):
        ParetoDA(level="features")
    with pytest.raises(uda.UDAError, match="no objective 'pul/align'"):
        make(FixedWeights({"pul/align": 1.0}))


CASES = [
    (ParetoDA, SMALL),
    (MGDA, {"normalise": "loss+"}),
    (PCGrad, {"level": "parameters"}),
    (CAGrad, {}),
    (UncertaintyWeights, {"objectives": ["classification", "partner/gap"]}),
    (FixedWeights, {"weights": {"partner/gap": 0.3}}),
]
IDS = [c.__name__ for c, _ in CASES]


@pytest.mark.slow
def test_pareto_goes_through_a_run():
    check_plugin(ParetoDA, init_args=SMALL, ddp=False)


@pytest.mark.slow
@pytest.mark.parametrize(("cls", "init_args"), CASES[1:], ids=IDS[1:])
def test_plugin(cls, init_args):
    check_plugin(cls, init_args=init_args, ddp=False)


@pytest.mark.slow
def test_under_two_processes():
    check_plugins_ddp([(cls, {"init_args": init_args}) for cls, init_args in CASES])
