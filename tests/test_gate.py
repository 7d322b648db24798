"""Weighted gradients: the gate equals a direct computation, on one process and on two."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from torch import nn

import uda
from uda.gate import gated_sum, gradients, gram
from uda.testing import forks

WEIGHTS = {"classification": 0.25, "pull/align": 1.75, "pull/spread": 0.5}


class Pull(uda.Plugin):
    """Two objectives with a head of their own and fixed weights, nothing more."""

    def __init__(self, level: str = "features", weights: bool = True) -> None:
        super().__init__()
        self.level, self.weights = level, weights
        self.seen: list[torch.Tensor] = []

    @uda.hookimpl
    def build(self, model):
        if not hasattr(self, "probe"):
            self.probe = nn.Linear(model.feature_dim, 1)

    @uda.hookimpl
    def align_features(self, step):
        s, t = step.source.features, step.target.features
        return {
            "align": (self.probe(s).mean() - self.probe(t).mean()) ** 2,
            "spread": (t - t.mean(0, keepdim=True)).square().mean(),
        }

    @uda.hookimpl
    def weigh_objectives(self, step, objectives):
        self.seen.append(objectives.gram(self.level))
        self.inner = objectives.inner(step.target.features.square().mean(), "parameters")
        return WEIGHTS if self.weights else None


class Reruns(Pull):
    """As :class:`Pull`, but declares that features do not gate it."""

    reruns_backbone = True


def make(plugin, norm="layer"):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
    return uda.UDA(
        backbone, plugins={"pull": plugin}, bottleneck=5, bottleneck_norm=norm, num_classes=3, input_shape=[6],
        source_names=["source"], optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip


def batch(n=8, seed=1):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=g)
    source = {"x": torch.randn(n, 6, generator=g), "y": y, "index": torch.arange(n)}
    target = {"x": torch.randn(n, 6, generator=g) + 1, "index": torch.arange(n)}
    return {"sources": {"source": source}, "target": target}


def direct(model, data):
    """Weighted gradients on shared and plain gradients on other parameters, objective by objective."""
    total: dict[str, torch.Tensor] = {}
    source, target = data["sources"]["source"], data["target"]
    shared = [n for n, _ in model.named_parameters() if n.startswith(("backbone", "bottleneck"))]
    grams = []
    for name, weight in WEIGHTS.items():
        model.zero_grad()
        z = model.bottleneck(model.backbone(torch.cat([source["x"], target["x"]])))
        s, t = z.split(len(source["x"]))
        z.retain_grad()
        probe = model.plugins["pull"].probe
        loss = {
            "classification": lambda s=s: nn.functional.cross_entropy(model.head(s), source["y"]),
            "pull/align": lambda s=s, t=t, probe=probe: (probe(s).mean() - probe(t).mean()) ** 2,
            "pull/spread": lambda t=t: (t - t.mean(0, keepdim=True)).square().mean(),
        }[name]()
        loss.backward()
        grams.append(z.grad.flatten().clone())
        for n, p in model.named_parameters():
            if p.grad is not None:
                total[n] = total.get(n, 0) + (weight if n in shared else 1.0) * p.grad
    grams = torch.stack(grams)
    return total, grams @ grams.T


class Catch(L.Callback):
    """Keeps the gradients that the optimiser is about to use."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def fit_one(model, data, **options):
    catch = Catch()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[catch], use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader([data], batch_size=None, collate_fn=lambda x: x))
    return catch.grads


@pytest.mark.parametrize("cls", [Pull, Reruns])
@pytest.mark.parametrize("level", ["features", "parameters", "bottleneck"])
def test_weights_reach_shared_parameters_only(cls, level):
    model = make(cls(level))
    expected, expected_gram = direct(model, batch())
    model.zero_grad()
    got = fit_one(model, batch(), devices=1)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-5, atol=1e-7, msg=name)
    if level == "features":
        torch.testing.assert_close(model.plugins["pull"].seen[0], expected_gram, rtol=1e-5, atol=1e-8)


def test_no_weights_is_the_plain_sum():
    weighed, plain = make(Pull(weights=False)), make(Pull())
    plain.hooks._calls["weigh_objectives"] = []
    one, two = fit_one(weighed, batch(), devices=1), fit_one(plain, batch(), devices=1)
    for name in one:
        assert torch.equal(one[name], two[name]), name


def test_inner_products_with_another_loss():
    model = make(Pull())
    data = batch()
    fit_one(model, data, devices=1)
    model2 = make(Pull())
    step = uda.Step(model2, data, 0.0, 0, 0)
    losses = {"a": step.source.features.sum(), "b": step.target.features.square().sum()}
    objectives = uda.Objectives(losses, step)
    other = step.target.features.abs().sum()
    shared = [*model2.backbone.parameters(), *model2.bottleneck.parameters()]
    found = [torch.autograd.grad(x, shared, retain_graph=True) for x in (*losses.values(), other)]
    flat = [torch.cat([g.flatten() for g in grads]) for grads in found]
    expected = torch.stack([flat[0] @ flat[2], flat[1] @ flat[2]])
    torch.testing.assert_close(objectives.inner(other), expected)
    with pytest.raises(uda.UDAError, match="compare on parameters"):
        objectives.inner(other, "features")


def test_gram_comes_with_the_inner_products(monkeypatch):
    """One exchange a gradient and step, not two."""
    model = make(Pull())
    step = uda.Step(model, batch(), 0.0, 0, 0)
    losses = {"a": step.source.features.sum(), "b": step.target.features.square().sum()}
    together, alone = uda.Objectives(losses, step), uda.Objectives(losses, step)
    calls = []
    plain = uda.gate.mean_over_ranks
    monkeypatch.setattr(uda.gate, "mean_over_ranks", lambda g: (calls.append(1), plain(g))[1])
    together.inner(step.target.features.abs().sum(), "bottleneck")
    found = together.gram("bottleneck")
    assert len(calls) == len(losses) + 1
    torch.testing.assert_close(found, alone.gram("bottleneck"))


def test_gated_sum_keeps_the_value_and_weighs_the_gradient():
    z = torch.randn(4, 3, dtype=torch.float32, requires_grad=True)
    losses = [z.square().sum(), z.sum()]
    grads = gradients(losses, [z])
    total = gated_sum(losses, torch.tensor([0.5, 3.0]), [z], grads)
    assert total.item() == pytest.approx(sum(x.item() for x in losses), rel=1e-6)
    total.backward()
    torch.testing.assert_close(z.grad, 0.5 * 2 * z + 3.0)
    torch.testing.assert_close(gram(grads, grads)[1, 1], torch.tensor(12.0))


def test_a_learnt_weight_receives_the_value_of_its_objective():
    model = make(Pull())
    step = uda.Step(model, batch(), 0.0, 0, 0)
    losses = {"a": step.source.features.square().mean(), "b": step.target.features.sum()}
    learnt = torch.tensor(0.3, requires_grad=True)
    objectives = uda.Objectives(losses, step)
    total = objectives.combine({"a": learnt.exp(), "b": 2.0})
    assert total.item() == pytest.approx(sum(x.item() for x in losses.values()), rel=1e-5)
    fixed = objectives.combine({"a": float(learnt.exp()), "b": 2.0})
    shared = list(model.bottleneck.parameters())
    grad, *got = torch.autograd.grad(total, [learnt, *shared], retain_graph=True)
    assert grad.item() == pytest.approx(float(learnt.exp()) * losses["a"].item(), rel=1e-5)
    for g, e in zip(got, torch.autograd.grad(fixed, shared), strict=True):
        torch.testing.assert_close(g, e)


def test_unknown_weight_is_refused():
    model = make(Pull())
    step = uda.Step(model, batch(), 0.0, 0, 0)
    objectives = uda.Objectives({"classification": step.source.logits.sum()}, step)
    with pytest.raises(uda.UDAError, match=r"'clasification'.*classification"):
        objectives.combine({"clasification": 1.0})


class TwoHalves(L.LightningDataModule):
    """Each rank gets its half of one batch."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def train_dataloader(self):
        n = len(self.data["target"]["x"]) // self.trainer.world_size
        rows = slice(self.trainer.global_rank * n, (self.trainer.global_rank + 1) * n)
        half = {
            "sources": {"source": {k: v[rows] for k, v in self.data["sources"]["source"].items()}},
            "target": {k: v[rows] for k, v in self.data["target"].items()},
        }
        return torch.utils.data.DataLoader([half], batch_size=None, collate_fn=lambda x: x)


class Linear(Pull):
    """Objectives that are means over samples, so that halves add up to the whole."""

    @uda.hookimpl
    def align_features(self, step):
        s, t = step.source.features, step.target.features
        return {"align": self.probe(s).square().mean() - self.probe(t).mean(), "spread": t.square().mean()}




class Save(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        torch.save({"grads": grads, "gram": module.plugins["pull"].seen[0], "inner": module.plugins["pull"].inner},
                   f"{self.path}.{trainer.global_rank}")  # fmt: skip


class LinearReruns(Linear):
    reruns_backbone = True


def fit_all(devices, folder):
    """All cases, on this rank."""
    for number, (cls, level) in enumerate(CASES):
        fit(cls, level, devices, f"{folder}/{number}.n{devices}")


def fit(cls, level, devices, path):
    options = {"strategy": "ddp"} if devices == 2 else {}
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Save(path)],
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    trainer.fit(make(cls(level)), datamodule=TwoHalves(batch(8)))


CASES = [(Linear, "features"), (Linear, "parameters"), (LinearReruns, "parameters")]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """All cases on two processes and on one."""
    folder = tmp_path_factory.mktemp("gate")
    wrong, outputs = forks.run_ranks(fit_all, 2, folder, folder=folder)
    assert not wrong, outputs
    fit_all(1, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: f"{CASES[i][0].__name__}-{CASES[i][1]}")
def test_two_processes_equal_one_with_the_whole_batch(halves, case):
    one, first, second = (torch.load(halves / f"{case}.{n}") for n in ("n1.0", "n2.0", "n2.1"))
    for key in ("gram", "inner"):
        torch.testing.assert_close(first[key], one[key], rtol=1e-5, atol=1e-7)
        assert torch.equal(first[key], second[key])
    for name, grad in one["grads"].items():
        torch.testing.assert_close(first["grads"][name], grad, rtol=1e-5, atol=1e-7, msg=name)
